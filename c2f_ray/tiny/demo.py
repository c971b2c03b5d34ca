"""The demo: runs the three jobs on the tiny world as a driver script would, and says what came of it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from c2f_ray.driver.loop import train
from c2f_ray.evaluation.job import evaluate
from c2f_ray.merging.job import merge
from c2f_ray.recipe import load_recipe
from c2f_ray.recipe.roles import train_roles
from c2f_ray.runtime.session import ray_session
from c2f_ray.watch.metrics import MetricsLine, read_metrics
from c2f_ray.watch.progress import table_console
from c2f_ray.watch.report import format_table, write_report

ENDS = 3  # steps averaged at the start and at the end of training


def run_demo(overrides: list[str]) -> None:
    """Runs training, merging, evaluation and report, in one Ray session.

    Findings that a run does not show are named with their numbers; they are no errors.
    """
    recipe = load_recipe("tiny", *overrides)
    console = table_console()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - began

    with ExitStack() as stack:
        with timed("start"):
            stack.enter_context(ray_session(recipe, train_roles(recipe), address="local"))
        with timed("train"):
            folder = train(recipe, fresh=True)
        with timed("merge"):
            merge(recipe)
        with timed("evaluate"):
            evaluation = evaluate(recipe)
    with timed("report"):
        report = write_report(folder)
    console.print(format_table(evaluation))
    for finding in findings(read_metrics(folder / "metrics.jsonl"), evaluation):
        console.print(str(finding), highlight=False)
    times = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items())
    console.print(f"wall time: {times}; {sum(seconds.values()):.0f} s in all", highlight=False)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    console.print("for more of c2f-ray: source .venv/bin/activate", highlight=False)


@dataclass(frozen=True)
class Finding:
    """One statement about the coarse-to-fine phenomenon, and the margins that it needs: each must be above 0."""

    text: str
    expected: str
    margins: dict[str, float]

    @property
    def shown(self) -> bool:
        return all(margin > 0 for margin in self.margins.values())

    def __str__(self) -> str:
        return f"shown: {self.text}" if self.shown else f"not shown: measured: {self.text}; expected: {self.expected}"


def findings(steps: list[MetricsLine], evaluation: dict[str, Any]) -> list[Finding]:
    """Compares the run with the four statements that the demo is there to show."""
    models = {model["name"]: model["metrics"] for model in evaluation["models"]}
    coarse = models["coarse"]

    def ends(key: str) -> tuple[float, float]:
        values = [line[key] or 0.0 for line in steps]
        return fmean(values[:ENDS]), fmean(values[-ENDS:])

    reward, length, limit = ends("reward/mean"), ends("length/mean"), ends("length/limit")
    return [
        Finding(
            f"reward of samples rises from {reward[0]:.2f} to {reward[1]:.2f}",
            "a rise of more than 0.3",
            {"rise": reward[1] - reward[0] - 0.3},
        ),
        Finding(
            f"length limit grows from {limit[0]:.0f} to {limit[1]:.0f}, mean length from {length[0]:.0f} to "
            f"{length[1]:.0f} tokens",
            "both more than doubled",
            {"limit": limit[1] / limit[0] - 2, "length": length[1] / length[0] - 2},
        ),
        Finding(
            f"the coarse actor repeats {coarse['repeated_lines']:.0%} of its lines and overruns "
            f"{coarse['truncated']:.0%} of the time",
            "more than 30% and 50%",
            {"repeated_lines": coarse["repeated_lines"] - 0.3, "truncated": coarse["truncated"] - 0.5},
        ),
        _fine_finding(evaluation["best"], models),
    ]


def _fine_finding(best: str | None, models: dict[str, dict[str, float]]) -> Finding:
    coarse, instruct = models["coarse"], models["instruct"]
    expected = "a fine actor with less than half of the coarse actor's repetition, better than the instruct model"
    if best is None:
        return Finding("no fine actor that evaluate.choose allows", expected, {"fine actors": 0.0})
    fine = models[best]
    return Finding(
        f"{best} repeats {fine['repeated_lines']:.0%}, with reward {fine['reward']:.2f} against the instruct model's "
        f"{instruct['reward']:.2f} and {fine['strict']:.0%} right and ended against {instruct['strict']:.0%}",
        expected,
        {
            "repeated_lines": coarse["repeated_lines"] / 2 - fine["repeated_lines"],
            "reward": fine["reward"] - instruct["reward"],
            "strict": fine["strict"] - instruct["strict"],
        },
    )
