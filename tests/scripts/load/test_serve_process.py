"""A `far serve` process for the scripts: stand-ins for the command that start, stop and fail in every way."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import serve_process
from far_runtime.errors import FarError
from serve_process import ServerStats, serving

READY = "print('serving x at http://127.0.0.1:5 (page)', flush=True); "
WAIT = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({})); "


def command(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let this Python code run in place of `far serve`."""
    monkeypatch.setattr(serve_process, "COMMAND", [sys.executable, "-c", code])


def test_a_server_stops_at_the_end_and_its_log_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = "print(sys.argv[1:], os.getsid(0) == os.getpid(), file=sys.stderr, flush=True); "
    command(monkeypatch, WAIT.format(0) + log + READY + "time.sleep(60)")
    with serving(Path("bundle"), ["--threads", "1"]) as address:
        assert address == "http://127.0.0.1:5"
    told = capsys.readouterr().err
    assert told.startswith("the server's log, 1 lines, begins:\n")
    # A session of its own, so that the terminal's Ctrl-C does not reach it.
    assert "['bundle', '--port', '0', '--threads', '1'] True" in told


def test_a_server_that_does_not_exit_with_0_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, WAIT.format(3) + READY + "time.sleep(60)")
    with pytest.raises(FarError, match="far serve exited with 3 after SIGTERM, not 0"), serving(Path("bundle")):
        pass


def test_a_server_that_exits_by_itself_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wait = f"[time.sleep(0.01) for _ in range(3000) if not os.path.exists({str(tmp_path / 'go')!r})]"
    command(monkeypatch, "import os, sys, time; " + READY + wait + "; sys.exit('out of memory')")
    with pytest.raises(FarError, match="exited by itself, with 1: out of memory"), serving(Path("bundle")):
        (tmp_path / "go").touch()
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT) is None:
            pass


def test_a_server_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "import sys; sys.exit('no such bundle')")
    with pytest.raises(FarError, match="far serve did not start: no such bundle"), serving(Path("bundle")):
        pass


def test_the_statistics_of_all_models_are_added_up() -> None:
    text = """
# TYPE far_batch_size histogram
far_batch_size_bucket{le="1.0",model="a"} 2.0
far_batch_size_bucket{le="2.0",model="a"} 2.0
far_batch_size_bucket{le="4.0",model="a"} 5.0
far_batch_size_bucket{le="+Inf",model="a"} 5.0
far_batch_size_bucket{le="1.0",model="b"} 1.0
far_batch_size_bucket{le="2.0",model="b"} 1.0
far_batch_size_bucket{le="4.0",model="b"} 1.0
far_batch_size_bucket{le="+Inf",model="b"} 1.0
# TYPE far_pictures counter
far_pictures_total{model="a"} 14.0
far_pictures_total{model="b"} 1.0
# TYPE far_rejections counter
far_rejections_total{reason="queue"} 7.0
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 1000.0
# TYPE process_cpu_seconds counter
process_cpu_seconds_total 2.5
"""
    expected = ServerStats(memory=1000, files=0, cpu=2.5, pictures=15, refused={"queue": 7}, batches={1: 3, 4: 3})
    assert ServerStats.parse(text) == expected
    assert ServerStats.parse(text + "# TYPE process_open_fds gauge\nprocess_open_fds 9.0\n").files == 9
