"""A run's metrics: one JSON line per step, and the same numbers as TensorBoard scalars, as gauges of Ray's that
Prometheus reads, and where the recipe names a project in Weights & Biases.

Invariant: in `metrics.jsonl` everything is a function of the seed, but for wall times and rates, whose keys begin
with `time/`.
"""

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from c2f_ray.data.atomic import write_text

MetricsLine = dict[str, float | None]  # `step`, then metrics by name; a number that was not finite is None


class MetricsLog:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder.

    ``step`` is the last step that stands: 0 for a new run, the checkpoint's when resuming. Later lines, and a line
    that a crash cut short, are dropped from the file, and TensorBoard hides the same steps. ``wandb`` names a project:
    a run that goes on stays one run there.
    """

    def __init__(self, folder: Path, step: int = 0, wandb: str | None = None) -> None:
        self._folder = folder
        self._gauges = _gauges()
        self._wandb = None if wandb is None else _wandb_run(folder, wandb)
        self._open(step)

    def go_back(self, step: int) -> None:
        """Drops what came after ``step``, the last that stands now."""
        self._close_files()
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds of import that reading needs not

        path = self._folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if (line["step"] or 0) <= step] if path.exists() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
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
        for key, value in metrics.items() if self._gauges else ():
            phase, _, name = key.partition("/")
            gauge, tags = self._gauges["metric"], {"phase": phase, "name": name}
            if phase == "time" and name.endswith("_s") and not name.endswith("_per_s"):
                role, _, part = name.removesuffix("_s").partition("_")
                gauge, tags = self._gauges["seconds"], {"role": role, "part": part or "all"}
            gauge.set(value, tags={"run": self._folder.resolve().name} | tags)
        if self._wandb is not None:
            self._wandb.log(line)

    def close(self) -> None:
        self._close_files()
        if self._wandb is not None:
            self._wandb.finish()

    def _close_files(self) -> None:
        self._file.close()
        self._tensorboard.close()


def _gauges() -> dict[str, Any]:
    """By what they measure; none without Ray. Ray serves them on every node to Prometheus."""
    import ray  # a second of import that reading needs not
    from ray.util.metrics import Gauge

    if not ray.is_initialized():
        return {}
    return {
        "metric": Gauge("c2f_metric", "A run's metric PHASE/NAME, of its last step", ("run", "phase", "name")),
        "seconds": Gauge("c2f_seconds", "Seconds of the last step by role", ("run", "role", "part")),
    }


def _wandb_run(folder: Path, project: str) -> Any:
    """The recipe that is shown there has no secrets: it has the names of environment variables."""
    import wandb  # pyrefly: ignore (installed where a recipe asks for it)

    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    name = folder.resolve().name
    run = wandb.init(project=project, name=name, id=path.read_text(), resume="allow", dir=str(folder), config=recipe)
    run.define_metric("*", step_metric="step")  # a step that was done again is logged again
    return run


def read_metrics(path: Path) -> list[MetricsLine]:
    """All steps of a `metrics.jsonl`; a last line that was cut short by a crash is left out."""
    lines = path.read_text().split("\n")[:-1]  # a complete line ends with a newline
    return [json.loads(line) for line in lines]


def without_timing(line: MetricsLine) -> MetricsLine:
    """What two runs of the same seed must agree on."""
    return {key: value for key, value in line.items() if not key.startswith("time/")}
