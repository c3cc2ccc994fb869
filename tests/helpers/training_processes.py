"""Processes of `far train`, forked from a server that has loaded torch once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = (
    "accelerate",
    "torch.distributed",
    "torch.utils.flop_counter",
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "far_training.cli.main",
    "far_training.loop.trainer",
    "far_training.sampling",
    "far_training.systems.far",
    "far_training.systems.vae",
    "far_training.systems.vqvae",
)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(PRELOADED))


def start(output: Path, *arguments: object, world: int = 1, half_written: bool = False) -> list[BaseProcess]:
    """Start `far train ARGUMENTS --threads 1` in `world` processes on the CPU, as torchrun does.

    output: file for what they print. half_written: let each be killed while it writes its state.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    line = ["train", *map(str, arguments), "--threads", "1"]
    processes = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        values = {**environment, **ranks} if world > 1 else {}
        values |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        process = context.Process(target=_run, args=(output, line, values, half_written), daemon=True)
        process.start()
        processes.append(process)
    return processes


def run(output: Path, *arguments: object, world: int = 1, half_written: bool = False) -> str:
    """Wait for processes that are started so, which have to end well unless they are killed; what they printed."""
    processes = start(output, *arguments, world=world, half_written=half_written)
    for process in processes:
        process.join(300)
    printed = output.read_text()
    assert half_written or [process.exitcode for process in processes] == [0] * world, printed
    return printed


def _run(output: Path, line: list[str], environment: dict[str, str], half_written: bool) -> None:
    os.environ.update(environment)
    printed = output.open("a", buffering=1)
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    sys.stdout = sys.stderr = printed
    if half_written:
        _kill_while_saving()
    from far_runtime.cli.main import main

    main(line)


def _kill_while_saving() -> None:
    import signal

    import torch

    save = torch.save

    def half(state: object, path: Path) -> None:
        save(state, path)
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
