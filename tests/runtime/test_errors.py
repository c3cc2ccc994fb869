"""Messages whose settings' names are spelled by each face of the program."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from far_runtime.cli.option_names import option, with_options
from far_runtime.errors import FarError, Message, SettingName, join_texts, spelled

MESSAGE = Message("use a smaller ", SettingName("batch_size"), ", or another ", SettingName("output"))


def test_the_command_line_spells_names_as_options() -> None:
    assert MESSAGE == "use a smaller batch_size, or another output"
    assert with_options(MESSAGE) == "use a smaller --batch-size, or another -o"
    assert with_options("batch_size is no name here") == "batch_size is no name here"
    assert with_options(FarError(SettingName("top_k"), " 9: too many")) == "--top-k 9: too many"
    assert spelled(MESSAGE, str.upper) == "use a smaller BATCH_SIZE, or another OUTPUT"


def test_an_error_that_is_raised_again_keeps_the_names() -> None:
    error = FarError(SettingName("steps"), " 0: expected 1 to 1000")
    again = FarError("graph denoise: ", error.message, "; see the log")
    assert str(again) == "graph denoise: steps 0: expected 1 to 1000; see the log"
    assert with_options(again) == "graph denoise: --steps 0: expected 1 to 1000; see the log"
    assert with_options(join_texts([error.message, "and more"], "; ")) == "--steps 0: expected 1 to 1000; and more"


@pytest.mark.parametrize(
    "sent",
    [
        pickle.loads(pickle.dumps(MESSAGE)),
        copy.deepcopy(MESSAGE),
        Message.from_json(json.loads(json.dumps(MESSAGE.to_json()))),
        pickle.loads(pickle.dumps(FarError(MESSAGE))).message,
    ],
    ids=["pickle", "deepcopy", "json", "error"],
)
def test_names_outlast_the_way_between_processes(sent: Message) -> None:
    assert sent == MESSAGE and spelled(sent, option) == with_options(MESSAGE)
