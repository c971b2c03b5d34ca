"""`c2f-ray watch RUN`: a run as its files tell it, from any machine that sees its folder."""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from c2f_ray.errors import RecipeError
from c2f_ray.plan.clusters import actors_of
from c2f_ray.recipe import Recipe, load_recipe
from c2f_ray.runtime.trace import Event, Span, last_steps, read_trace, spans_of
from c2f_ray.runtime.watchdog import duration
from c2f_ray.watch.metrics import MetricsLine, read_metrics

REFRESH_S = 2.0
WIDTH = 60  # characters of the timeline and of a curve
STEPS_SHOWN = 3  # in the timeline
MEAN_OVER = 10  # steps over which the time of one is taken
NOTES_SHOWN = 5
BARS = "▁▂▃▄▅▆▇█"
CURVES = [
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/greedy_mean", "greedy reward", "{:.3f}"),
    ("heldout/best_of_n", "held-out reward", "{:.3f}"),
    ("length/limit", "limit, tokens", "{:.0f}"),
    ("length/mean", "length, tokens", "{:.0f}"),
    ("length/truncated", "truncated", "{:.0%}"),
    ("kl/sequence", "KL, nats", "{:.3g}"),
    ("time/samples_per_s", "samples/s", "{:.1f}"),
    ("time/scores_ready", "scores in time", "{:.0%}"),
]


def watch(folder: Path, *, once: bool, console: Console | None = None) -> None:
    """Shows a run's folder until the run has ended, or one frame of it where there is no terminal, or ``once``."""
    console = console or Console()
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except RecipeError as error:
        raise RecipeError(*(f"{folder / 'recipe.yaml'}: {problem}" for problem in error.problems)) from None
    if once or not console.is_terminal:
        console.print(frame(folder, recipe, time.time()))
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            events = read_trace(folder)
            live.update(frame(folder, recipe, time.time()), refresh=True)
            if _state(events, 0.0)[1]:
                return
            time.sleep(REFRESH_S)


def frame(folder: Path, recipe: Recipe, now: float) -> RenderableType:
    """What is known at ``now``, in seconds since 1970."""
    events = read_trace(folder)
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    spans = spans_of(events)
    state, over = _state(events, now)
    parts: list[RenderableType] = [_head(spans, lines, state)]
    shown = last_steps([span for span in spans if span.step is not None], STEPS_SHOWN)
    until = max((span.ended or now for span in shown), default=now) if over else now
    if shown:
        began = min(span.began for span in shown)
        parts.append(timeline_table(shown, until, f"{_clock(began)} to {_clock(until)}"))
    if lines:
        parts.append(_curves(lines))
    parts.append(_roles(recipe, shown, None if over else spans, until))
    notes = [event for event in events if event["ph"] == "i"][-NOTES_SHOWN:]
    parts += [Text(f"{_clock(event['ts'] / 1e6)} {_first_line(event['name'])}", style="dim") for event in notes]
    return Panel(Group(*parts), title=f"c2f_ray {folder.resolve().name}", title_align="left", border_style="dim")


def _state(events: Sequence[Event], now: float) -> tuple[str, bool]:
    """In words, and whether the run's last start is over. A killed run cannot say so: its last sign is told."""
    if not events:
        return "has not begun to train", False
    last = events[-1]
    if last["ph"] == "i" and (last["name"] == "ended" or last["name"].startswith("stopped: ")):
        return f"{last['name'].split(':')[0]} at {_clock(last['ts'] / 1e6)}", True
    at = max(event.get("ts", 0) + event.get("dur", 0) for event in events) / 1e6
    return f"last sign {duration(now - at)} ago", False


def _head(spans: Sequence[Span], lines: Sequence[MetricsLine], state: str) -> Table:
    total = next((span.total_steps for span in reversed(spans) if span.total_steps), None)
    done = lines[-1]["step"] or 0 if lines else 0
    table = Table.grid(padding=(0, 2))
    seconds = [line["time/step_s"] or 0.0 for line in lines[-MEAN_OVER:]]
    left = ""
    if seconds and total and done < total:
        left = f"about {duration(sum(seconds) / len(seconds) * (total - done))} left"
    table.add_row(f"step {done:.0f}/{total or '?'}", ProgressBar(total or 1, done, width=30), state, left)
    return table


def timeline_table(spans: Sequence[Span], until: float, label: str) -> Table:
    """One row for each role: where it is at work, a character is filled."""
    began = min(span.began for span in spans)
    cell = max(until - began, 1e-6) / WIDTH
    table = Table.grid(padding=(0, 2))
    for row in dict.fromkeys(span.row for span in spans):
        mine = [span for span in spans if span.row == row]
        bar = ""
        for number in range(WIDTH):
            start = began + number * cell
            covered = sum(max(0.0, min(span.ended or until, start + cell) - max(span.began, start)) for span in mine)
            bar += "█" if covered >= cell / 2 else "▏" if covered > 0 else "·"
        doing = next((span for span in mine if span.ended is None), None)
        table.add_row(row, Text(bar), "" if doing is None else f"{doing.name}, {until - doing.began:.0f} s")
    table.add_row("", Text(label, style="dim"))
    return table


def _curves(lines: Sequence[MetricsLine]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, name, form in CURVES:
        values = [value for line in lines if (value := line.get(key)) is not None]
        if values:
            table.add_row(name, Text(form.format(values[-1]), style="bold"), Text(sparkline(values)))
    return table


def sparkline(values: Sequence[float]) -> str:
    """Means of at most ``WIDTH`` equal parts of the values, from the lowest to the highest of them."""
    parts = min(len(values), WIDTH)
    bounds = [len(values) * part // parts for part in range(parts + 1)]
    means = [sum(values[i:j]) / (j - i) for i, j in pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def _roles(recipe: Recipe, shown: Sequence[Span], spans: Sequence[Span] | None, until: float) -> Table:
    """Actors and GPUs of each role, its share of the time that is shown, and of a run that is not over its stage."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("role", "actors", "GPUs", "busy", *(["in work"] if spans is not None else [])):
        table.add_column(title, justify="left" if title in ("role", "in work") else "right")
    actors = actors_of(recipe)
    together = until - min((span.began for span in shown), default=until)
    for role in ("rollout", "reward", "learner", "driver"):
        mine = [actor for actor in actors if actor.role == role]
        busy = sum((span.ended or until) - span.began for span in shown if span.row == role)
        share = f"{busy / together:.0%}" if together else ""
        gpus = sum(actor.gpus for actor in mine)
        cells = [role, str(len(mine) or 1), str(gpus), share]
        if spans is not None:
            doing = [span for span in spans if span.row == role and span.ended is None]
            cells.append(", ".join(f"{span.name}, {until - span.began:.0f} s" for span in doing))
        table.add_row(*cells)
    return table


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _first_line(text: str) -> str:
    return text.split("\n")[0][:200]
