"""`c2f-ray plan RECIPE --simulate`: the real driver's loop on fake actors that take as long as the estimate says.

The seconds are scaled, so that a step takes few; what is printed is scaled back. The driver's own seconds are real and
are not scaled. Nothing is loaded, and nothing is written but into a temporary folder.
"""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table

from c2f_ray.data.prompts import PromptSet, prompt_groups
from c2f_ray.data.trajectory import Ragged
from c2f_ray.driver.check import Checked
from c2f_ray.driver.loop import training_of
from c2f_ray.driver.sampling import Rollouts
from c2f_ray.plan.clusters import CPU
from c2f_ray.plan.estimate import Estimate
from c2f_ray.plan.schedule import Step, num_rollouts, step
from c2f_ray.plan.table import told_seconds
from c2f_ray.recipe import FixedLength, Recipe
from c2f_ray.recipe.roles import scorers
from c2f_ray.runtime.session import ray_session
from c2f_ray.runtime.trace import Span, Timeline, read_trace, spans_of
from c2f_ray.simulate.fakes import FakeActors, FakeWork
from c2f_ray.watch.dashboard import timeline_table
from c2f_ray.watch.metrics import MetricsLog
from c2f_ray.watch.progress import Progress

STEPS = 4
STEP_S = 2.0  # that a simulated step takes at the least
SAMPLE_S = 1e-4  # and for each of its samples: several times the driver's own, which cannot be scaled
PARTS = ("rollout", "reward", "learner", "weights")


@dataclass(frozen=True)
class SimulatedStep:
    seconds: float
    parts: dict[str, float]  # how long each was under way in this step
    driver: float  # the driver's own, between them


@dataclass(frozen=True)
class Simulation:
    planned: Step
    scale: float  # seconds of the run in one of the simulation
    steps: list[SimulatedStep]
    spans: list[Span]  # in seconds of the run, from its first step on


def simulate(recipe: Recipe, found: Estimate, network: float) -> Simulation:
    """Some steps at the longest response limit. ``network``: bytes a second between nodes."""
    limit = recipe.length.max_tokens
    per_node = max((node.gpus for node in found.nodes.nodes), default=0)
    gpu = found.nodes.gpu if recipe.learner.gpus_per_rank else CPU
    planned = step(recipe, found.models, gpu, found.engines[limit], limit, network, per_node)
    scale = planned.seconds / max(STEP_S, SAMPLE_S * num_rollouts(recipe))
    windows: list[tuple[float, float]] = []
    own: list[float] = []

    def after_step(began: float, metrics: dict[str, Any]) -> None:
        windows.append((began, time.time()))
        own.append(metrics["time/other_s"])

    with TemporaryDirectory() as folder, ray_session(recipe, [], "local"):
        run = Path(folder)
        recipe = _shortened(recipe, run)
        with closing(FakeActors(work=fake_work(recipe, planned, scale))) as actors:
            run_on_fakes(recipe, run, actors, after_step)
        spans = [span for span in spans_of(read_trace(run)) if span.row in PARTS and span.ended]
    steps = [
        SimulatedStep(*_seconds(spans, *window, driver, scale), driver)
        for window, driver in zip(windows, own, strict=True)
    ]
    return Simulation(planned, scale, steps, list(_scaled(spans, windows[0][0], scale)))


def run_on_fakes(
    recipe: Recipe, folder: Path, actors: FakeActors, after_step: Callable[[float, dict[str, Any]], None]
) -> None:
    """The real loop. ``after_step`` gets the moment at which a step began, in seconds since 1970, and its metrics."""
    base: Any = training_of(recipe.learner)

    class OnFakes(base):
        def step(self) -> dict[str, Any]:
            began = time.time()
            metrics = super().step()
            after_step(began, metrics)
            return metrics

        def save(self, rollouts: Rollouts, path: Path) -> None:
            """There is no text to write."""

    checked = fake_checked(recipe)
    with ExitStack() as stack:
        timeline = stack.enter_context(Timeline(folder, checked.total_steps, details=False))
        progress = Progress(checked.total_steps, Console(file=io.StringIO()))
        log = stack.enter_context(closing(MetricsLog(folder)))
        OnFakes(recipe, folder, checked, stack, timeline, actors, progress).run(log)


def _shortened(recipe: Recipe, folder: Path) -> Recipe:
    steps = min(STEPS, recipe.run.steps or STEPS)
    run = {"name": folder.name, "folder": str(folder.parent), "steps": steps, "epochs": None, "wandb": None}
    changed: dict[str, Any] = {
        "run": recipe.run.model_copy(update=run),
        "length": FixedLength(rule="fixed", max_tokens=recipe.length.max_tokens),
    }
    if hasattr(recipe.learner, "min_margin"):
        changed["learner"] = recipe.learner.model_copy(update={"min_margin": None})  # fake rewards have no margins
    return recipe.model_copy(update=changed)


def fake_work(recipe: Recipe, planned: Step, scale: float) -> FakeWork:
    """The estimate's seconds, divided by ``scale`` and, of rollouts and scores, among the samples."""
    count = num_rollouts(recipe)
    return FakeWork(
        samples=(planned.rollout / ceil(count / recipe.rollout.actors) / scale,),
        scores=[
            (scorer, seconds * scorer.reward.workers / count / scale)
            for scorer, seconds in zip(scorers(recipe), planned.scores, strict=True)
        ],
        update=planned.learner / scale,
        transfer=planned.weights / scale,
    )


def fake_checked(recipe: Recipe) -> Checked:
    """As many prompts as the steps draw, of no text."""
    heldout = None
    if recipe.learner.needs_heldout:
        assert recipe.evaluate is not None  # the recipe is refused otherwise
        heldout = fake_prompts("heldout", recipe.evaluate.num_prompts or 1)
    steps = recipe.run.steps or 0
    prompts = fake_prompts("prompt", recipe.prompts.per_step * steps)
    return Checked(
        prompts=prompts,
        groups=prompt_groups(prompts, None),
        heldout=heldout,
        template="",
        total_steps=steps,
        policy_config={},
        resume=None,
        notes=[],
    )


def fake_prompts(name: str, count: int) -> PromptSet:
    tokens = Ragged(np.zeros(count, np.int32), np.arange(count + 1))
    return PromptSet([f"{name}-{row}" for row in range(count)], [[]] * count, [{}] * count, tokens, 0)


def _seconds(
    spans: list[Span], began: float, ended: float, driver: float, scale: float
) -> tuple[float, dict[str, float]]:
    """Of the step between two moments of the simulation, and of its parts."""
    parts = {
        part: scale
        * sum(max(0.0, min(span.ended or ended, ended) - max(span.began, began)) for span in spans if span.row == part)
        for part in PARTS
    }
    return (ended - began - driver) * scale + driver, parts


def _scaled(spans: list[Span], zero: float, scale: float) -> Iterator[Span]:
    for span in spans:
        if span.began >= zero:
            ended = None if span.ended is None else (span.ended - zero) * scale
            yield replace(span, began=(span.began - zero) * scale, ended=ended)


def format_simulation(found: Simulation) -> RenderableType:
    table = Table(title="simulated steps, seconds", title_justify="left", title_style="bold")
    table.add_column("step")
    for name in (*PARTS, "driver", "step"):
        table.add_column(name, justify="right")
    for number, simulated in enumerate(found.steps, start=1):
        cells = [*(simulated.parts[part] for part in PARTS), simulated.driver, simulated.seconds]
        table.add_row(str(number), *(told_seconds(cell) for cell in cells))
    until = max(span.ended or 0.0 for span in found.spans)
    taken = median(step.seconds for step in found.steps)
    return Group(
        table,
        f"by the estimate {told_seconds(found.planned.seconds)} s a step, simulated {told_seconds(taken)} s, "
        f"{taken / found.planned.seconds - 1:+.0%}: roles that wait for each other, and how busy this machine is",
        timeline_table(found.spans, until, f"0 to {told_seconds(until)} s"),
        f"the real driver on fake actors that only wait; one second of it stands for {told_seconds(found.scale)}, but "
        "for those of the driver, which are real and of this machine",
    )
