"""The engine cache never gives out a stale or broken engine."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import Bundle, Graph, Manifest, manifest_checksum, open_bundle, record_of, write_manifest
from far_runtime.engines.cache.compatibility import (
    RECIPE,
    engine_file_reader,
    incompatibility,
    library_version,
    stale_reason,
)
from far_runtime.engines.cache.entry import SIDECAR, CachedEngine, EngineKey, bundle_facts, read_engine
from far_runtime.engines.cache.store import EngineCache
from far_runtime.errors import FarError
from far_runtime.machine.gpu import Gpu
from far_runtime.model_info import ModelInfo
from far_runtime.storage.atomic import whole_folder

FORK = multiprocessing.get_context("fork")
NOBODY = 65534
ENGINE_FILE = b"file" * 1000
GPU = Gpu("NVIDIA RTX 4090", "8.9")
MODEL = ModelInfo(grid=1, channels=1, image_size=1)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle of one graph, whose content does not matter here; the user's cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return make_bundle(tmp_path / "bundle")


def make_bundle(folder: Path, weights: bytes = b"weights", rows: int = 8, precision: str = "fp16") -> Bundle:
    folder.mkdir(exist_ok=True)
    (folder / "decode.onnx").write_bytes(b"graph")
    (folder / "weights.bin").write_bytes(weights)
    graph = Graph("decode", "decode", "decode.onnx", (), (), 1e-3, profile={"batch": (1, 1, rows)}, precision=precision)
    files = {name: record_of(folder / name) for name in ("decode.onnx", "weights.bin")}
    write_manifest(folder, Manifest("FAR", MODEL, {}, (graph,), files, precision=precision))
    return open_bundle(folder)


def key_of(bundle: Bundle, library: str = "tensorrt-rtx", **facts: Any) -> EngineKey:
    about: dict[str, Any] = {
        "recipe": RECIPE,
        "version": library_version(library) or "1.7",
        "targets": ["sm89"],
        "flags": {},
    }
    return EngineKey(library, {**bundle_facts(bundle), **about, **facts})


def write_engine_file(folder: Path) -> None:
    (folder / "decode.plan").write_bytes(ENGINE_FILE)


def built(bundle: Bundle) -> CachedEngine:
    return EngineCache(bundle).build(key_of(bundle), write_engine_file)


def other_engine(bundle: Bundle, key: EngineKey) -> None:
    """Nothing is found under another key, and a build of it makes an engine beside the first."""
    cache = EngineCache(bundle)
    assert key.digest != key_of(bundle).digest
    assert cache.find(key) is None
    cache.build(key, lambda folder: (folder / "decode.plan").write_bytes(b"other") and None)
    found = cache.find(key)
    assert found is not None and found.read("decode") == b"other"


def test_a_built_engine_is_found_and_says_what_it_is(bundle: Bundle) -> None:
    made = EngineCache(bundle).build(key_of(bundle), lambda folder: (write_engine_file(folder), {"memory": 3})[1])
    found = EngineCache(bundle).find(key_of(bundle))
    assert found == made and found.path == bundle.path / "engines" / key_of(bundle).folder
    assert found.file("decode").read_bytes() == found.read("decode") == ENGINE_FILE
    told = json.loads((found.path / SIDECAR).read_text())
    assert told["facts"] == {
        "precision": "fp16",
        "files": {name: record.sha256 for name, record in bundle.manifest.files.items()},
        "profiles": {"decode": {"batch": [1, 1, 8]}},
        "recipe": RECIPE,
        "version": key_of(bundle).facts["version"],
        "targets": ["sm89"],
        "flags": {},
    }
    assert told["files"]["decode.plan"]["bytes"] == len(ENGINE_FILE)
    assert told["created_by"].startswith("far-deploy ") and told["notes"] == {"memory": 3}
    assert 0 <= told["seconds"] < 3600 and abs(told["created"] - time.time()) < 3600
    with pytest.raises(FarError, match="holds nothing for graph transformer"):
        found.file("transformer")


def test_what_was_built_is_not_built_again(bundle: Bundle) -> None:
    first = built(bundle)
    assert EngineCache(bundle).build(key_of(bundle), lambda folder: pytest.fail("built twice")) == first


@pytest.mark.parametrize("change", [{"weights": b"Weights"}, {"rows": 16}, {"precision": "fp32"}])
def test_changed_weights_changed_shapes_and_another_precision_are_another_engine(
    bundle: Bundle, change: dict[str, Any]
) -> None:
    old = built(bundle)
    changed = make_bundle(bundle.path, **change)
    assert EngineCache(changed).find(key_of(changed)) is None
    assert stale_reason(old, bundle) == "" and stale_reason(old, changed) == "of another export of this bundle"
    EngineCache(changed).build(key_of(changed), lambda folder: (folder / "decode.plan").write_bytes(b"other") and None)
    found = EngineCache(changed).find(key_of(changed))
    assert found is not None and found.read("decode") == b"other"


def test_another_version_is_another_engine(bundle: Bundle) -> None:
    built(bundle)
    other_engine(bundle, key_of(bundle, version="0.1"))


def test_another_device_is_another_engine(bundle: Bundle) -> None:
    built(bundle)
    other_engine(bundle, key_of(bundle, targets=["sm86"]))


def test_other_build_flags_are_another_engine(bundle: Bundle) -> None:
    built(bundle)
    other_engine(bundle, key_of(bundle, flags={"optimization_level": 5}))


def test_another_library_is_another_engine(bundle: Bundle) -> None:
    built(bundle)
    assert EngineCache(bundle).find(replace(key_of(bundle), library="tensorrt")) is None


def damage_engine_file(path: Path, data: bytes) -> None:
    (path / "decode.plan").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda path: damage_engine_file(path, ENGINE_FILE[:-1]),
            "damaged: decode.plan has 3999 bytes instead of 4000",
        ),
        (lambda path: damage_engine_file(path, b"P" + ENGINE_FILE[1:]), "damaged: decode.plan was changed"),
        (lambda path: (path / "decode.plan").unlink(), "damaged: decode.plan is missing"),
        (lambda path: (path / SIDECAR).unlink(), "no engine.json"),
        (lambda path: (path / SIDECAR).write_text("{"), "damaged: engine.json cannot be read"),
        (lambda path: edit_sidecar(path, "library", "tensorrt"), "damaged: engine.json was changed"),
        (lambda path: edit_sidecar(path, "files", {}, True), "damaged: engine.json is incomplete"),
        (lambda path: edit_sidecar(path, "facts", {"version": "9"}, True), "renamed: its name is not its key's"),
    ],
    ids=["truncated", "changed byte", "missing", "no sidecar", "half a sidecar", "edited", "no files", "other facts"],
)
def test_a_truncated_engine_file_a_changed_byte_and_a_changed_sidecar_are_never_loaded(
    bundle: Bundle, damage: Callable[[Path], None], problem: str
) -> None:
    engine = built(bundle)
    damage(engine.path)
    cache = EngineCache(bundle)
    assert cache.find(key_of(bundle)) is None
    assert cache.entries()[0].problem.startswith(problem)
    again = cache.build(key_of(bundle), write_engine_file)  # takes the damaged one's place
    assert again.problem == "" and again.read("decode") == ENGINE_FILE
    assert len(cache.entries()) == 1


def edit_sidecar(path: Path, name: str, value: Any, sign: bool = False) -> None:
    content = json.loads((path / SIDECAR).read_text())
    content[name] = value
    if name == "files":
        del content[name]
    if sign:
        content["sha256"] = manifest_checksum(content)
    (path / SIDECAR).write_text(json.dumps(content))


def test_a_byte_that_changes_between_the_check_and_the_load_is_noticed(bundle: Bundle) -> None:
    engine = built(bundle)
    damage_engine_file(engine.path, b"P" + ENGINE_FILE[1:])
    with pytest.raises(FarError, match="changed since it was built"):
        engine.read("decode")


def test_a_sidecar_that_names_files_outside_is_refused(bundle: Bundle) -> None:
    engine = built(bundle)
    (bundle.path / "engines" / "outside").write_bytes(ENGINE_FILE)
    content = json.loads((engine.path / SIDECAR).read_text())
    edit_sidecar(engine.path, "files", content["files"])
    content["files"] = {"../outside": content["files"]["decode.plan"]}
    content["sha256"] = manifest_checksum(content)
    (engine.path / SIDECAR).write_text(json.dumps(content))
    assert "missing" in read_engine(engine.path).problem


def slow_build(path: Path, log: Path, seconds: float) -> None:
    def write(folder: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(seconds)
        write_engine_file(folder)

    made = EngineCache(open_bundle(path)).build(key_of(open_bundle(path)), write)
    assert made.read("decode") == ENGINE_FILE


def test_of_two_builds_at_once_one_builds_and_the_others_take_it(bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [FORK.Process(target=slow_build, args=(bundle.path, log, 0.5)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "built\n"
    assert [path.name for path in (bundle.path / "engines").iterdir()] == [key_of(bundle).folder]


def test_a_kill_during_a_build_leaves_no_engine_and_the_next_build_clears_up(bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = FORK.Process(target=slow_build, args=(bundle.path, log, 600))
    process.start()
    while not log.exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    cache = EngineCache(bundle)
    names = {path.name for path in (bundle.path / "engines").iterdir()}
    (unfinished,) = names - {f".{key_of(bundle).folder}.lock"}
    assert unfinished.startswith(f".{key_of(bundle).folder}.{process.pid}-") and unfinished.endswith(".part")
    assert cache.find(key_of(bundle)) is None and cache.entries() == [] and len(cache.leftovers()) == 1
    cache.build(key_of(bundle, version="other"), write_engine_file)  # also a build of something else
    assert cache.leftovers() == []
    assert built(bundle).read("decode") == ENGINE_FILE
    assert not [path for path in (bundle.path / "engines").iterdir() if path.name.startswith(".")]


def test_what_another_process_is_building_is_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = FORK.Process(target=slow_build, args=(bundle.path, log, 1))
    process.start()
    while not log.exists():
        time.sleep(0.01)
    cache = EngineCache(bundle)
    assert cache.leftovers() == []
    cache.build(key_of(bundle, version="other"), write_engine_file)
    process.join()
    assert process.exitcode == 0 and cache.find(key_of(bundle)) is not None


def as_nobody(work: Callable[[], None]) -> int | None:
    """Exit code of a process that does `work` without root's right to write everywhere."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    process = FORK.Process(target=run)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture
def readable() -> Any:
    """A folder that any account can reach, unlike pytest's own."""
    folder = Path("/tmp") / f"far-deploy-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name == "nt", reason="no accounts to change to")
def test_a_read_only_bundle_falls_back_to_the_users_cache_folder(
    readable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(readable / "bundle")
    home = readable / "home"
    home.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    os.chmod(home, 0o777)
    os.chmod(bundle.path, 0o555)

    def work() -> None:
        with pytest.raises(OSError):
            (bundle.path / "file").touch()
        made = built(bundle)
        assert made.path == home / "far-deploy" / "engines" / bundle.manifest.id / key_of(bundle).folder
        cache = EngineCache(bundle)
        assert cache.find(key_of(bundle)) == made and cache.entries() == [made]
        assert EngineCache(bundle).build(key_of(bundle), lambda folder: pytest.fail("built twice")) == made

    assert as_nobody(work) == 0
    assert not (bundle.path / "engines").exists()
    os.chmod(home, 0o555)
    shutil.rmtree(home / "far-deploy")

    def nowhere() -> None:
        with pytest.raises(FarError, match=r"no place for engines.*set XDG_CACHE_HOME"):
            built(bundle)

    assert as_nobody(nowhere) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_leaves_nothing(bundle: Bundle) -> None:
    def write(folder: Path) -> None:
        write_engine_file(folder)
        Path("/dev/full").write_bytes(ENGINE_FILE)

    with pytest.raises(FarError, match=r"the disk is full.*free some space"):
        EngineCache(bundle).build(key_of(bundle), write)
    assert list((bundle.path / "engines").iterdir()) == []


def test_a_disk_that_is_full_when_the_sidecar_is_written_leaves_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def full(path: Path, *args: Any, **options: Any) -> int:
        if path.name == SIDECAR:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(FarError, match="the disk is full"):
            built(bundle)
    assert list((bundle.path / "engines").iterdir()) == [] and EngineCache(bundle).find(key_of(bundle)) is None


def test_a_build_that_fails_leaves_nothing_and_a_damaged_engine_in_place(bundle: Bundle) -> None:
    def write(folder: Path) -> None:
        write_engine_file(folder)
        raise FarError("refused")

    damage_engine_file(built(bundle).path, b"")
    with pytest.raises(FarError, match="refused"):
        EngineCache(bundle).build(key_of(bundle), write)
    assert [path.name for path in (bundle.path / "engines").iterdir()] == [key_of(bundle).folder]


def test_a_bundle_that_is_replaced_during_the_build_gets_no_engine(bundle: Bundle) -> None:
    def in_place(folder: Path) -> None:
        write_engine_file(folder)
        make_bundle(bundle.path, b"new weights")

    def moved_away(folder: Path) -> None:
        bundle.path.rename(bundle.path.with_name("old"))
        make_bundle(bundle.path)
        write_engine_file(folder)

    for write in (in_place, moved_away):
        with pytest.raises(FarError, match="replaced while an engine was built"):
            EngineCache(bundle).build(key_of(bundle), write)
        assert EngineCache(open_bundle(bundle.path)).entries() == []


def test_a_new_export_drops_the_old_engines(bundle: Bundle) -> None:
    built(bundle)
    with whole_folder(bundle.path, check_replaceable=lambda target: None) as folder:
        make_bundle(folder, b"new weights")
    new = open_bundle(bundle.path)
    assert EngineCache(new).entries() == [] and EngineCache(new).find(key_of(new)) is None


def test_a_removed_engine_is_gone_and_the_others_stay(bundle: Bundle) -> None:
    cache = EngineCache(bundle)
    first = built(bundle)
    second = cache.build(key_of(bundle, version="other"), write_engine_file)
    assert {engine.name for engine in cache.entries()} == {first.name, second.name}
    cache.remove(first)
    assert [engine.name for engine in cache.entries()] == [second.name]


def test_what_is_no_engine_is_neither_listed_nor_removed(bundle: Bundle, tmp_path: Path) -> None:
    engine, cache = built(bundle), EngineCache(bundle)
    others = tmp_path / "others"
    for folder in (engine.path.with_name("my-notes"), engine.path.with_name(".mine.old"), others):
        folder.mkdir()
        (folder / "file").write_text("mine")
    named_alike = engine.path.with_name(f"tensorrt-{'0' * 16}")
    links = [named_alike, engine.path.with_name(f".{named_alike.name}.old")]
    for link in links:
        link.symlink_to(others)
    assert cache.entries() == [engine] and cache.leftovers() == []
    cache.remove(engine)
    cache.clear_leftovers()
    assert sorted(path.name for path in engine.path.parent.iterdir()) == sorted(
        [*(link.name for link in links), "my-notes", ".mine.old"]
    )
    assert (others / "file").read_text() == "mine"


def test_where_a_file_is_named_engines_they_go_to_the_users_folder(bundle: Bundle) -> None:
    (bundle.path / "engines").write_text("mine")
    assert built(bundle).path.is_relative_to(os.environ["XDG_CACHE_HOME"])
    assert (bundle.path / "engines").read_text() == "mine" and len(EngineCache(bundle).entries()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("created", "today"), ("notes", None), ("facts", []), ("facts", {"version": 10}), ("facts", {"targets": [89]})],
)
def test_a_sidecar_that_says_something_of_another_kind_is_damaged(bundle: Bundle, name: str, value: Any) -> None:
    engine = built(bundle)
    edit_sidecar(engine.path, name, value, sign=True)
    (found,) = EngineCache(bundle).entries()
    assert found.problem.startswith("damaged: engine.json is incomplete")


def test_an_engine_says_why_it_does_not_fit_here(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("far_runtime.engines.cache.compatibility.library_version", lambda library: "10.7.0")
    cache = EngineCache(bundle)

    def reason(library: str = "tensorrt", gpu: Gpu | None = GPU, **facts: Any) -> str:
        about = {
            "version": "10.7.0",
            "recipe": RECIPE,
            "device": GPU.name,
            "compute_capability": "8.9",
            "flags": {},
            **facts,
        }
        if "targets" in facts:
            del about["device"], about["compute_capability"]
        made = cache.build(EngineKey(library, {**bundle_facts(bundle), **about}), write_engine_file)
        return incompatibility(made, bundle, gpu)

    assert reason() == ""
    assert reason(gpu=None) == "for NVIDIA RTX 4090 (8.9); no NVIDIA GPU here"
    assert reason(recipe=1) == "built by another far-deploy"
    assert reason(version="10.3.0") == "built by tensorrt 10.3.0, here is 10.7.0"
    assert reason(version="10.3.0", flags={"version_compatible": True}) == ""
    assert reason(version="11.0.0", flags={"version_compatible": True}) != ""
    assert reason(version="9.3.0", flags={"version_compatible": True}) != ""
    orin: dict[str, Any] = {"device": "Orin", "compute_capability": "8.7"}
    assert reason(**orin) == "for Orin (8.7), here is NVIDIA RTX 4090 (8.9)"
    assert reason(**orin, flags={"hardware_compatible": "ampere+"}) == ""
    assert reason(**orin, flags={"hardware_compatible": "same-cc"}) != ""
    assert reason("tensorrt-rtx", targets=["sm86", "sm89"]) == ""
    assert reason("tensorrt-rtx", targets=["sm86"]) == "for sm86, here is sm89"
    monkeypatch.setattr("far_runtime.engines.cache.compatibility.library_version", lambda library: "")
    assert reason() == "tensorrt is not installed here"


def test_an_engine_that_runs_takes_the_newest_engine_file_that_fits_and_else_says_why_none_does(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("far_runtime.engines.cache.compatibility.library_version", lambda library: "1.7")
    monkeypatch.setattr("far_runtime.engines.cache.compatibility.find_gpu", lambda: GPU)
    command = f"far build {bundle.path} --engine tensorrt-rtx"
    with pytest.raises(FarError, match=r"none was built.*" + command):
        engine_file_reader(bundle, "tensorrt-rtx")("decode")
    cache = EngineCache(bundle)
    cache.build(key_of(bundle, version="1.7", targets=["sm86"]), write_engine_file)
    cache.build(key_of(bundle, version="1.6"), write_engine_file)
    with pytest.raises(FarError) as caught:
        engine_file_reader(bundle, "tensorrt-rtx")("decode")
    for part in ("for sm86, here is sm89", "built by tensorrt-rtx 1.6, here is 1.7", command):
        assert part in str(caught.value)
    cache.build(key_of(bundle, version="1.7"), write_engine_file)
    newest = cache.build(
        key_of(bundle, version="1.7", flags={"workspace": 9}),
        lambda folder: (folder / "decode.plan").write_bytes(b"newest") and None,
    )
    read = engine_file_reader(bundle, "tensorrt-rtx")
    assert read("decode") == b"newest"
    damage_engine_file(newest.path, b"tsewen")
    with pytest.raises(FarError, match="changed since it was built"):
        read("decode")
    with pytest.raises(FarError, match="no tensorrt engine fits here"):
        engine_file_reader(bundle, "tensorrt")("decode")
