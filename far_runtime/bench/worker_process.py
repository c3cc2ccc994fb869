"""A session in a process of its own, driven from here: its memory is its own, and its end is no end of ours."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from far_runtime.errors import FarError

OUT_OF_MEMORY = re.compile(r"out.of.memory|bad.?alloc|failed to allocate|can't allocate|could not allocate", re.I)
ALL_DONE = "close"
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


class Session(Protocol):
    """What a process holds: an object whose methods are called from outside, `open` first. It has to be picklable."""

    def open(self) -> Any:
        """Make it ready."""


class Failed(Exception):
    """A call did not come to its end. memory: for want of memory, as far as one can tell. dead: its process is gone."""

    def __init__(self, reason: str, memory: bool = False, dead: bool = False) -> None:
        super().__init__(reason)
        self.memory = memory
        self.dead = dead


class Worker:
    """A process with a session in it. One call at a time; closing it ends the process, whatever it does."""

    def __init__(self, session: Session, environment: Mapping[str, str] | None = None) -> None:
        """environment: variables that are set for the process."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, session), daemon=True)
        started = False
        try:
            with _environment(environment or {}), _undisturbed():
                self._process.start()
                started = True
        except BaseException:  # an interruption that came while it was started
            if started:
                self.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the session and wait; FarError as the session raised it, Failed for everything else."""
        try:
            self._connection.send((method, args))
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise _ended(self._process.exitcode) from None
        if kind == "refused":
            raise FarError(answer)
        if kind != "done":
            raise Failed(answer, memory=kind == "memory")
        return answer

    def close(self) -> None:
        """End the process and those that it has started."""
        pid = self._process.pid
        if self._process.is_alive():
            with contextlib.suppress(OSError, ValueError):
                self._connection.send((ALL_DONE, ()))
            self._process.join(1)
        if pid is not None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # a group of its own: see serve
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._connection.close()


def serve(connection: Connection, session: Session) -> None:
    """The process's side: answer calls until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)  # see _undisturbed
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            method, args = connection.recv()
        except (EOFError, OSError):
            return
        if method == ALL_DONE:
            return
        try:
            connection.send(_answer(session, method, args))
        except OSError:
            return  # nobody waits for it any more


def _answer(session: Session, method: str, args: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "done", getattr(session, method)(*args)
    except FarError as error:
        kind = "memory" if OUT_OF_MEMORY.search(str(error)) else "refused"
        return kind, error.message
    except MemoryError as error:
        return "memory", f"out of memory ({error})" if str(error) else "out of memory"
    except Exception as error:  # engines raise many types; none may end the comparison
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return "memory" if OUT_OF_MEMORY.search(text) else "failed", text


def _end_with_parent() -> None:
    """A process whose parent was killed must not go on computing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _ended(code: int | None) -> Failed:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        killed = -code == getattr(signal, "SIGKILL", 9)
        why = ", as the system does when memory runs out" if killed else ""
        return Failed(f"its process was ended by {name}{why}", memory=killed, dead=True)
    return Failed(f"its process ended with exit code {code}", dead=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Interruptions come after the block, not in it. A process whose start is broken off half-way would print that its
    orders ended too early; and one that is not yet in `serve` would print a traceback at Ctrl-C, which the terminal
    sends to every process of the command: it inherits the mask."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []  # other threads have no mask, and what reaches them is for this one to handle
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in INTERRUPTIONS}
    masks = hasattr(signal, "pthread_sigmask")
    if masks:
        resource_tracker.ensure_running()  # else the start would do it, and take the mask away
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
