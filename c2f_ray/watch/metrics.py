"""A run's metrics: one JSON line per step, and the same numbers as TensorBoard scalars.

Invariant: in `metrics.jsonl` everything is a function of the seed, but for wall times and rates, whose keys begin
with `time/`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

MetricsLine = dict[str, float | None]  # `step`, then metrics by name; a number that was not finite is None


class MetricsLog:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder.

    ``step`` is the last step that stands: 0 for a new run, the checkpoint's when resuming. Later lines, and a line
    that a crash cut short, are dropped from the file, and TensorBoard hides the same steps.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._folder = folder
        self._open(step)

    def go_back(self, step: int) -> None:
        """Drops what came after ``step``, the last that stands now."""
        self.close()
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds of import that reading needs not

        path = self._folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if (line["step"] or 0) <= step] if path.exists() else []
        aside = path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.rename(path)
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Write one step's line, flushed; ``metrics`` includes ``step``, counted from 1."""
        line = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in metrics.items():
            if key != "step":
                self._tensorboard.add_scalar(key, value, int(metrics["step"]))
        self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: Path) -> list[MetricsLine]:
    """All steps of a `metrics.jsonl`; a last line that was cut short by a crash is left out."""
    lines = path.read_text().split("\n")[:-1]  # a complete line ends with a newline
    return [json.loads(line) for line in lines]


def without_timing(line: MetricsLine) -> MetricsLine:
    """What two runs of the same seed must agree on."""
    return {key: value for key, value in line.items() if not key.startswith("time/")}
