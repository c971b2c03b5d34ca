"""The demo: builds the tiny world, runs the three jobs on it as a driver script would, and says what came of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from c2f_ray.driver import train
from c2f_ray.evaluation.job import evaluate
from c2f_ray.merging.job import merge
from c2f_ray.recipe import Recipe, load_recipe
from c2f_ray.session import ray_session, train_needs
from c2f_ray.tiny.world import build_world
from c2f_ray.watch.metrics import MetricsLine, read_metrics
from c2f_ray.watch.progress import table_console
from c2f_ray.watch.report import format_table, write_report

WORLD = {
    "base": "the base model",
    "instruct": "the instruct model",
    "reward": "the reward model",
    "pair": "the Mixtral pair, of which configs/tiny_rejection_sampling.yaml takes the log ratio",
}
ENDS = 3  # steps averaged at the start and at the end of training


def run_demo(recipe_path: Path, overrides: list[str]) -> None:
    """World, training, merging, evaluation and report; one Ray session for the three jobs."""
    recipe = load_recipe(recipe_path, *overrides)
    console = table_console()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - began

    with timed("world"):
        _build_world(recipe, console)
    with ray_session(recipe, train_needs(recipe), address="local"):
        with timed("train"):
            folder = train(recipe, fresh=True)
        with timed("merge"):
            merge(recipe)
        with timed("evaluate"):
            evaluation = evaluate(recipe)
    with timed("report"):
        report = write_report(folder)
    console.print(format_table(evaluation))
    for line in findings(read_metrics(folder / "metrics.jsonl"), evaluation):
        console.print(line, highlight=False)
    times = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items())
    console.print(f"wall time: {times}; {sum(seconds.values()):.0f} s in all", highlight=False)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    console.print("for more of c2f-ray: source .venv/bin/activate", highlight=False)


def _build_world(recipe: Recipe, console: Console) -> None:
    folder = Path(recipe.policy.model).parent
    console.print(f"building the tiny world in {folder}; the next demo finds it there", highlight=False)
    told: dict[str, int] = {}  # quarters of each model's training

    def progress(stage: str, fraction: float) -> None:
        quarter = int(4 * fraction)
        if quarter > told.get(stage, -1):
            told[stage] = quarter
            console.print(f"training {WORLD[stage]}: {quarter * 25}%", highlight=False)

    build_world(folder, progress=progress)


def findings(steps: list[MetricsLine], evaluation: dict[str, Any]) -> list[str]:
    """What the run shows of the coarse-to-fine phenomenon, or does not, in numbers."""
    models = {model["name"]: model["metrics"] for model in evaluation["models"]}
    coarse, instruct = models["coarse"], models["instruct"]
    best = evaluation["best"]

    def ends(key: str) -> tuple[float, float]:
        values = [line[key] or 0.0 for line in steps]
        return fmean(values[:ENDS]), fmean(values[-ENDS:])

    reward, length, limit = ends("reward/mean"), ends("length/mean"), ends("length/limit")
    facts = [
        (reward[1] > reward[0] + 0.3, f"reward of samples rises from {reward[0]:.2f} to {reward[1]:.2f}"),
        (
            limit[1] > 2 * limit[0] and length[1] > 2 * length[0],
            f"length limit grows from {limit[0]:.0f} to {limit[1]:.0f}, mean length from {length[0]:.0f} to "
            f"{length[1]:.0f} tokens",
        ),
        (
            coarse["repeated_lines"] > 0.3 and coarse["truncated"] > 0.5,
            f"the coarse actor repeats {coarse['repeated_lines']:.0%} of its lines and overruns "
            f"{coarse['truncated']:.0%} of the time",
        ),
    ]
    if best is None:
        facts.append((False, "a fine actor that evaluate.choose allows"))
    else:
        fine = models[best]
        holds = fine["repeated_lines"] < coarse["repeated_lines"] / 2
        facts.append(
            (
                holds and fine["reward"] > instruct["reward"] and fine["strict"] > instruct["strict"],
                f"{best} repeats {fine['repeated_lines']:.0%}, with reward {fine['reward']:.2f} against the instruct "
                f"model's {instruct['reward']:.2f} and {fine['strict']:.0%} right and ended against "
                f"{instruct['strict']:.0%}",
            )
        )
    return [f"{'shown' if holds else 'NOT SHOWN'}: {text}" for holds, text in facts]
