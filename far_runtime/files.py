"""Output files that appear whole or not at all, in folders that are known to be writable beforehand."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from far_runtime.errors import FarError


def check_folder(folder: Path, option: str = "-o") -> None:
    """Make a folder where it is missing and try to write in it; FarError, naming the option to change, if that fails.

    Called before long work, so that nothing is computed that cannot be saved.
    """
    if folder.exists() and not folder.is_dir():
        raise FarError(f"{folder}: is a file, a folder is needed; name another with {option}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FarError(
            f"{folder}: cannot be written ({error.strerror}); name a folder that can be with {option}"
        ) from error


def check_file(path: Path, option: str = "-o") -> None:
    """FarError unless `path` can become a file: its folder is writable and nothing but a file stands in its place."""
    if path.exists() and not path.is_file():
        raise FarError(f"{path}: exists and is no file; give {option} the name of a file")
    check_folder(path.parent, option)


def check_distinct(outputs: Iterable[tuple[str, Path]], inputs: Mapping[str, Path] | None = None) -> None:
    """FarError, naming both options, where two of the outputs (option and file) are one file, or one is an input."""
    read = {path.resolve(): option for option, path in (inputs or {}).items()}
    written: dict[Path, str] = {}
    for option, path in outputs:
        file = path.resolve()
        if file in read:
            raise FarError(f"{path}: {option} would replace the file given with {read[file]}; name another")
        if file in written:
            raise FarError(f"{path}: {written[file]} and {option} would both write it; give one of them another name")
        written[file] = option


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; after the block it takes the place of `path`, or vanishes if the block raises.

    A failed write (a full disk, say) becomes a FarError that names `path`.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise FarError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or write elsewhere"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def user_cache() -> Path:
    """The user's cache folder of far-deploy: in XDG_CACHE_HOME (LOCALAPPDATA on Windows), or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        home = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:  # an account without a home
        raise FarError(f"no folder for what is kept ({error}); set XDG_CACHE_HOME to a folder of yours") from error
    return home / "far-deploy"
