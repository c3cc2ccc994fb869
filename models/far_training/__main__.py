"""`python -m far_training COMMAND` is `far train COMMAND`, for launchers that take a module (torchrun -m)."""

from __future__ import annotations

import sys

from far_runtime.cli.main import main

main(["train", *sys.argv[1:]])
