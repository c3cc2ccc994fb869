"""`far sample` in one process: shards whole or not at all, every seed once, the pictures of the pipeline."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from far_runtime.conditioning.subjects import Subject
from far_runtime.errors import FarError
from far_runtime.images.writing import read_metadata
from far_runtime.pipeline import Pipeline
from far_runtime.sample.run import SampleRun
from far_runtime.storage.lock import held

FAST = ("--engine", "onnxruntime", "--threads", 1, "--shard-size", 4, "--batch-size", 3)
COMMAND = [sys.executable, "-c", "import sys; from far_runtime.cli.main import main; main(sys.argv[1:])", "sample"]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the shards by its name; each name once in all of them."""
    contents: dict[str, bytes] = {}
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                assert member.name not in contents
                file = tar.extractfile(member)
                assert file is not None
                contents[member.name] = file.read()
    return contents


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pixels(file: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def test_every_seed_is_there_once_with_the_picture_of_the_pipeline(
    far: Any, tiny: Any, pipeline: Pipeline, tmp_path: Path
) -> None:
    result = far("sample", tiny.bundle, "--count", 23, "--seed", 5, "-o", "out", "--guidance", 2, *FAST)
    assert result.code == 0, result.err
    assert "out: 23 pictures in 6 shards, seeds 5 to 27" in result.out
    assert "some have one more" in result.err
    contents = content(tmp_path / "out")
    keys = [f"{seed:010d}" for seed in range(5, 28)]
    assert list(contents) == [f"{key}.{kind}" for key in keys for kind in ("png", "json")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "engine.json", "sample.json", *(f"shard-0000{i}.tar" for i in range(6)),
    ]  # fmt: skip
    labels = [i % 10 for i in range(23)]  # every class as often as any other
    expected = pipeline.generate(labels, range(5, 28), guidance=2)
    for i, key in enumerate(keys):
        difference = np.abs(pixels(contents[f"{key}.png"]).astype(int) - expected.images[i]).max()
        assert difference <= 1  # batches of other sizes may round differently
        settings = json.loads(contents[f"{key}.json"])
        assert (settings["seed"], settings["label"]) == (5 + i, labels[i])
        assert settings["sampling"] == expected.settings[i].sampling
        assert settings["batch"] == ([3, 3, 3, 1] * 6)[i] if i < 20 else 3
    file = tmp_path / "one.png"
    file.write_bytes(contents["0000000009.png"])
    assert read_metadata(file).to_dict() == json.loads(contents["0000000009.json"])
    again = far("generate", tiny.bundle, "--like", file, "-o", "again.png")
    assert "repeated bit for bit" in again.out


def test_a_killed_run_goes_on_and_ends_with_the_same_files(far: Any, tiny: Any, tmp_path: Path) -> None:
    arguments = [str(tiny.bundle), "--count", "24", "--steps", "40", *map(str, FAST)]
    out = tmp_path / "out"
    with subprocess.Popen([*COMMAND, *arguments, "-o", str(out)], stderr=subprocess.DEVNULL) as run:
        while not (out / "shard-00001.tar").exists():
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    (out / f".shard-00004.tar.{run.pid}.part").write_bytes(b"half")  # as if it had been writing
    before = len(list(out.glob("shard-*.tar")))
    assert 2 <= before < 6
    result = far("sample", *arguments, "-o", out)
    assert f"going on: {4 * before} are there" in result.err
    assert f"drew {24 - 4 * before} in " in result.out
    assert far("sample", *arguments, "-o", "whole").code == 0
    assert files(out) == files(tmp_path / "whole")
    third = far("sample", *arguments, "-o", out)
    assert third.code == 0
    assert "drew" not in third.out


def test_parquet_holds_the_same_pictures(far: Any, tiny: Any, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for format in ("webdataset", "parquet"):
        assert (
            far("sample", tiny.bundle, "--count", 6, "--label", "lion", "-o", format, "--format", format, *FAST).code
            == 0
        )
    tars = content(tmp_path / "webdataset")
    rows = [
        row for file in sorted((tmp_path / "parquet").glob("*.parquet")) for row in parquet.read_table(file).to_pylist()
    ]
    assert [row["key"] for row in rows] == [f"{seed:010d}" for seed in range(6)]
    for seed, row in enumerate(rows):
        assert row["png"] == tars[f"{row['key']}.png"]
        assert json.loads(row["settings"]) == json.loads(tars[f"{row['key']}.json"])
        assert (row["seed"], row["label"], row["text"]) == (seed, 7, "lion")
    (tmp_path / "parquet" / "shard-00001.parquet").write_bytes(b"PAR1 cut short")
    again = far("sample", tiny.bundle, "--count", 6, "--label", 7, "-o", "parquet", "--format", "parquet", *FAST)
    assert "shard-00001.parquet: is damaged" in again.err
    assert parquet.read_table(tmp_path / "parquet" / "shard-00001.parquet").num_rows == 2


def test_prompts_of_a_file_in_turn(far: Any, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n\na lion\n")
    arguments = ("--prompts", "prompts.txt", "--negative", "a cat", "--count", 4, "-o", "out")
    result = far("sample", tiny.t2i_bundle, *arguments, *FAST)
    assert result.code == 0, result.err
    settings = [json.loads(data) for name, data in content(tmp_path / "out").items() if name.endswith("json")]
    assert [each["name"] for each in settings] == ["a red apple", "a lion"] * 2
    assert {each["negative"] for each in settings} == {"a cat"}


def test_a_benchmark_s_file_is_read_as_far_as_there_are_pictures(
    far: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as far as the benchmark's own number, of which a larger --count draws more."""
    captions = [{"image_id": i, "id": i, "caption": f"a red apple {i}"} for i in range(5)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    monkeypatch.setattr("far_runtime.conditioning.prompt_files.COCO_COUNT", 2)
    arguments = ("sample", tiny.t2i_bundle, "--prompts", "captions.json", *FAST)
    assert far(*arguments, "--count", 5, "-o", "out").code == 0
    names = [json.loads(data)["name"] for name, data in content(tmp_path / "out").items() if name.endswith("json")]
    assert sorted(names) == [f"a red apple {i}" for i in range(5)]


def test_a_folder_takes_one_run_alone(far: Any, tiny: Any, tmp_path: Path) -> None:
    arguments = ("sample", tiny.bundle, "--count", 8, "-o", "out", *FAST)
    assert far(*arguments).code == 0
    before = files(tmp_path / "out")
    for more, message in (
        (("--seed", 1), "seed 0 -> 1"),
        (("--label", 3), "subjects 10 -> 1"),
        (("--steps", 2), "'steps': 2"),
        (("--batch-size", 2), "batch_size 3 -> 2"),
    ):
        result = far(*arguments, *more)
        assert (result.code, result.out) == (2, "")
        assert "was begun with other settings" in result.err and message in result.err
    (tmp_path / "out" / "shard-00001.tar").write_bytes(before["shard-00001.tar"][:700])
    other = far(*arguments, "--threads", 2)
    assert other.code == 2 and "threads 1 -> 2" in other.err
    with held(tmp_path / "out" / ".lock"):
        assert "another far sample is at work there" in far(*arguments).err
    result = far(*arguments)
    assert "shard-00001.tar: is damaged, and drawn again" in result.err
    assert files(tmp_path / "out") == before


def test_a_run_that_drew_nothing_does_not_claim_the_engine(
    far: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise FarError("no memory")

    arguments = ("sample", tiny.bundle, "--count", 8, "-o", "out", *FAST)
    with monkeypatch.context() as patch:
        patch.setattr("far_runtime.sample.draw.draw_shard", fails)
        assert "no memory" in far(*arguments).err
    assert list(files(tmp_path / "out")) == ["sample.json"]
    (tmp_path / "out" / "engine.json").write_text('{"engine": "of a run killed before its first shard was there"}')
    assert far(*arguments, "--threads", 2).code == 0
    (tmp_path / "out" / "shard-00001.tar").unlink()
    assert "threads 2 -> 1" in far(*arguments).err


def test_a_mixed_run_goes_on_without_ray_and_with_another_engine(far: Any, tiny: Any, tmp_path: Path) -> None:
    arguments = ("sample", tiny.bundle, "--count", 8, "-o", "out", "--mixed", *FAST)
    assert far(*arguments).code == 0
    (tmp_path / "out" / "shard-00001.tar").unlink()
    assert far(*arguments, "--threads", 2).code == 0
    assert list(files(tmp_path / "out")) == ["sample.json", "shard-00000.tar", "shard-00001.tar"]


def test_what_cannot_be_written_leaves_nothing_half_written(tiny: Any, tmp_path: Path) -> None:
    """A limit on the size of files, which a shard exceeds and the other files do not."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); " + COMMAND[2]
    arguments = [str(tiny.bundle), "--count", "8", "-o", str(tmp_path / "out"), *map(str, FAST)]
    run = subprocess.run([sys.executable, "-c", limited, "sample", *arguments], capture_output=True, text=True)
    assert run.returncode == 2
    assert "shard-00000.tar: cannot be written (File too large); free some space" in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["engine.json", "sample.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "--workers: for --ray alone"),
        (["--mixed", "--address", "auto"], "--address: for --ray alone"),
        (["--ray", "--resource", "jetson"], "expected NAME=AMOUNT"),
        (["--seed", str(2**64 - 1)], "the seeds go beyond"),
        (["--prompt", "a lion"], "draws from class labels"),
        (["--label", "3", "--prompts", "prompts.txt"], "give one of them"),
        (["--label", "10"], "out of range"),
        (["--engine", "none"], "unknown"),
        (["--top-k", "3"], "no such setting"),
    ],
)
def test_bad_options_are_an_error_in_one_line(far: Any, tiny: Any, arguments: list[str], message: str) -> None:
    result = far("sample", tiny.bundle, "--count", 10, "-o", "out", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err and result.err.count("\n") == 1, result.err


def test_a_model_of_text_wants_prompts(far: Any, tiny: Any) -> None:
    assert "--prompts FILE" in far("sample", tiny.t2i_bundle, "--count", 10, "-o", "out").err


def test_shards_and_batches_hold_every_picture_once() -> None:
    run = SampleRun([Subject(0), Subject(1)], {}, count=23, seed=2**64 - 23, batch_size=4, shard_size=10)
    numbers = [number for shard in run.shards for batch in run.batches(shard) for number in batch]
    assert numbers == list(range(23))
    assert [len(batch) for batch in run.batches(run.shards[0])] == [4, 4, 2]
    assert run.key(22) == str(2**64 - 1)
    assert run.subject(21).label == 1
    with pytest.raises(FarError, match="seeds go beyond"):
        SampleRun([Subject(0)], {}, count=23, seed=2**64 - 22)
