"""What a run measured: RUN/metrics.jsonl, TensorBoard and RUN/curves.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

METRICS = "metrics.jsonl"


class MetricsLog:
    """RUN/metrics.jsonl (one line per record) and the same numbers for TensorBoard.

    Records after `step` are dropped: a run that resumes at this step writes them again.
    """

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self.path = run / METRICS
        records = [record for record in read_metrics(self.path) if record["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Append a record of a step, `seconds` of training into the run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "minutes": round(seconds / 60, 3), **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def draw(self) -> None:
        """Write RUN/curves.png."""
        from far_training.sheets import draw_curves

        draw_curves(read_metrics(self.path), self.path.with_name("curves.png"))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Records of a metrics file, none if there is no file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
