"""An object in a process of its own, whose methods are called from here: its memory is its own, and a crash ends that
process alone."""

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


class Target(Protocol):
    """An object that can be pickled; its methods are called in the worker's process, `open` first."""

    def open(self) -> Any:
        """Make it ready."""


class WorkerError(Exception):
    """A call failed in a worker's process, or the process ended."""

    out_of_memory: bool
    """Whether it looks as if memory ran out."""

    process_ended: bool
    """Whether the process is gone."""

    def __init__(self, reason: str, out_of_memory: bool = False, process_ended: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory
        self.process_ended = process_ended


class Worker:
    """A process that holds a target and answers one call at a time."""

    def __init__(self, target: Target, environment: Mapping[str, str] | None = None) -> None:
        """Start the process, with `environment` added to its environment variables."""
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(target=serve, args=(far_end, target), daemon=True)
        started = False
        try:
            with _environment(environment or {}), _interruptions_after():
                self._process.start()
                started = True
        except BaseException:
            # An interruption that arrived while the process started.
            if started:
                self.close()
            raise
        finally:
            far_end.close()

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the target and return its result; its FarErrors pass, all else is a WorkerError."""
        try:
            self._connection.send((method, args))
            outcome, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise _ended(self._process.exitcode) from None
        if outcome == "refused":
            raise FarError(result)
        if outcome != "done":
            raise WorkerError(result, out_of_memory=outcome == "memory")
        return result

    def close(self) -> None:
        """End the process and those that it has started, whatever they are doing."""
        pid = self._process.pid
        if self._process.is_alive():
            with contextlib.suppress(OSError, ValueError):
                self._connection.send((ALL_DONE, ()))
            self._process.join(1)
        if pid is not None and hasattr(os, "killpg"):
            # `serve` has made it a process group of its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._connection.close()


def serve(connection: Connection, target: Target) -> None:
    """Answer calls until there are no more; runs in the worker's process."""
    # Ctrl-C reaches every process of the terminal, and the parent is the one that ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        # The mask was inherited: see _interruptions_after.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
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
            connection.send(_call(target, method, args))
        except OSError:
            # The parent does not wait for the result any more.
            return


def _call(target: Target, method: str, args: tuple[Any, ...]) -> tuple[str, Any]:
    """Outcome ("done", "refused", "memory" or "failed") and the result or the reason."""
    try:
        return "done", getattr(target, method)(*args)
    except FarError as error:
        return "memory" if OUT_OF_MEMORY.search(str(error)) else "refused", error.message
    except MemoryError as error:
        return "memory", f"out of memory ({error})" if str(error) else "out of memory"
    except Exception as error:
        # Engines raise many types of exceptions, and none of them may end the comparison.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return "memory" if OUT_OF_MEMORY.search(text) else "failed", text


def _end_with_parent() -> None:
    """End this process when its parent is gone, so that it does not go on computing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _ended(code: int | None) -> WorkerError:
    """The error for a process that ended with this exit code."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        killed = -code == getattr(signal, "SIGKILL", 9)
        why = ", as the system does when memory runs out" if killed else ""
        return WorkerError(f"its process was ended by {name}{why}", out_of_memory=killed, process_ended=True)
    return WorkerError(f"its process ended with exit code {code}", process_ended=True)


@contextlib.contextmanager
def _interruptions_after() -> Iterator[None]:
    """Hold back interruptions until the block has ended.

    A process whose start is interrupted half-way prints that its input ended too early. One that has not reached
    `serve` prints a traceback at Ctrl-C, which the terminal sends to all processes of the command; so the new process
    inherits the signal mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Other threads have no mask, and Python runs the handlers of what reaches them in this thread.
    arrived: list[int] = []
    handlers = {number: signal.signal(number, lambda number, frame: arrived.append(number)) for number in INTERRUPTIONS}
    masks = hasattr(signal, "pthread_sigmask")
    if masks:
        # Otherwise the start of the process would start it, and remove the mask.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block."""
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
