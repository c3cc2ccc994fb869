"""Output files and folders that appear whole or not at all, and checks beforehand that they can be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from far_runtime.errors import FarError, SettingName

OUTPUT = SettingName("output")


def check_folder(folder: Path, option: str = OUTPUT) -> None:
    """Create a folder where it is missing, and try to write in it; FarError, which names the option, if that fails.

    It is called before long work, so that nothing is computed that cannot be saved.
    """
    if folder.exists() and not folder.is_dir():
        raise FarError(f"{folder}: is a file, a folder is needed; name another with ", option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FarError(
            f"{folder}: cannot be written ({error.strerror}); name a folder that can be with ", option
        ) from error


def check_file(path: Path, option: str = OUTPUT) -> None:
    """FarError unless `path` can become a file: its folder is writable and nothing but a file stands in its place."""
    if path.exists() and not path.is_file():
        raise FarError(f"{path}: exists and is no file; give ", option, " the name of a file")
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
    """A path beside `path` to write to. It takes the place of `path` after the block, or vanishes if the block raises.

    Raises FarError, naming `path`, where it cannot be written (a full disk, say).
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


def remove_parts(folder: Path, name: str = "*") -> None:
    """Remove the half-written files that killed processes left in a folder; only where nobody else writes there.

    name: of the files that they were to become, a pattern.
    """
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(
    target: Path, option: str = OUTPUT, check_replaceable: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A folder beside `target` to write to. It becomes `target` after the block, or vanishes if the block raises.

    check_replaceable lets it replace an older folder, which stays untouched until then: it raises FarError for a target
    that holds what must not be lost. Without it `target` has to be absent or empty. Where `target` is a link, the
    folder that it leads to is replaced. What a killed process left beside `target` is cleared first. Raises FarError
    for a target that may not be replaced, for a full disk, and where another process was faster.
    """
    target = resolved(target, option) if check_replaceable else target.absolute()
    check = check_replaceable or partial(check_new_folder, option=option)
    check(target)
    check_folder(target.parent, option)
    clear_leftovers(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", suffix=".part", dir=target.parent))
    old = folder.with_suffix(".old")
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        # Once more: another process may have put files there in the meantime.
        check(target)
        _replace(folder, target, old, option)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) >> 20
        raise FarError(
            f"{target.parent}: the disk is full after {size} MB; free some space, or name another folder with ",
            option,
        ) from error
    finally:
        # Interrupted between the two renames: the older folder comes back, unless another process was faster.
        if old.exists() and not target.exists():
            with contextlib.suppress(OSError):
                old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def check_new_folder(target: Path, option: str = OUTPUT) -> None:
    """FarError unless `target` is absent or an empty folder."""
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise FarError(f"{target}: is there already, and stays; remove it, or name another folder with ", option)


def _replace(folder: Path, target: Path, old: Path, option: str) -> None:
    """Put `folder` at `target`, and what was there at `old`; FarError where another process does the same now."""
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FarError(
            f"{target}: another process has put a folder there at the same moment, and that one stays; run the command "
            "again, or name another folder with ",
            option,
        ) from error


def resolved(target: Path, option: str = OUTPUT) -> Path:
    """The folder that a path leads to, by its full name; FarError for links in a circle."""
    try:
        return target.resolve()
    except (OSError, RuntimeError) as error:
        raise FarError(f"{target}: leads nowhere ({error}); name another folder with ", option) from error


def clear_leftovers(target: Path) -> None:
    """Remove the unfinished folders that killed processes left beside `target`.

    An older folder that such a process had just moved aside comes back.
    """
    for path in target.absolute().parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(target.name)}\.(\d+)-\w+\.(part|old)", path.name)
        if match is None or process_lives(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def process_lives(process: int) -> bool:
    """Whether a process of this number runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def user_cache() -> Path:
    """The user's cache folder of far-deploy: in XDG_CACHE_HOME (LOCALAPPDATA on Windows), or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        home = Path(base) if base else Path.home() / ".cache"
    # An account without a home.
    except RuntimeError as error:
        raise FarError(f"no folder for what is kept ({error}); set XDG_CACHE_HOME to a folder of yours") from error
    return home / "far-deploy"
