"""A run's charts, as SVG text to put into a page: colours are the page's CSS variables, so they follow its theme."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from c2f_ray.runtime.trace import Span
from c2f_ray.watch.metrics import MetricsLine

# Matplotlib wants real colours: these stand in for CSS variables until the SVG is written.
INK = "#00ff01"
SERIES = ["#00ff02", "#00ff03", "#00ff04", "#00ff05", "#00ff06"]
CSS_COLOURS = {INK: "var(--ink)"} | {colour: f"var(--series-{i + 1})" for i, colour in enumerate(SERIES)}
STAGES = ("rollout", "reward", "learner", "weights", "other")
Series = tuple[str, str, dict[str, Any]]  # metric, label, line style
COMPARED = [
    ("reward/mean", "Sampled reward of each run"),
    ("length/mean", "Mean response length of each run (tokens)"),
    ("kl/sequence", "KL of each run (nats per response)"),
    ("time/learner_s", "Time of each run's updates (s)"),
]
MAX_BARS = 80  # more steps than this share a bar
MAX_ACTORS = 32  # in the timeline
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "",  # replaced per chart: ids must not clash within one page
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


def charts(lines: Sequence[MetricsLine]) -> dict[str, str]:
    """Title and SVG of each chart for which the steps have numbers."""
    drawn: dict[str, str] = {}
    with mpl.rc_context(STYLE):
        for title, draw in [
            ("Reward", _reward),
            ("Held-out reward by round", _heldout),
            ("Response length (tokens)", _length),
            ("KL to the reference policy", _kl),
            ("Critic", _critic),
            ("Time per step (s)", _time),
        ]:
            figure = draw(lines)
            if figure is not None:
                drawn[title] = _svg(figure, title)
    return drawn


def compare(runs: Mapping[str, Sequence[MetricsLine]]) -> dict[str, str]:
    """Title and SVG of each chart that has one line for each of several runs, by name."""
    drawn: dict[str, str] = {}
    with mpl.rc_context(STYLE):
        for key, title in COMPARED:
            figure, (axes,) = _figure()
            found = False
            for i, (name, lines) in enumerate(runs.items()):
                style = {"color": SERIES[i % len(SERIES)], "linestyle": "-" if i < len(SERIES) else "--"}
                found |= _draw(axes, lines, [(key, name, style)])
            if found:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, handlelength=1.4)
                drawn[title] = _svg(figure, title)
    return drawn


def diagnosis_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG of the norms of the coarse and the instruct delta by layer, and below them of their cosine.

    ``rows`` are those of a run's `diagnosis.json`; what lies outside the layers is not drawn.
    """
    layers = [row for row in rows if row["name"].startswith("layer ")]
    title = "Deltas by layer"
    with mpl.rc_context(STYLE):
        figure, (norms, cosines) = _figure(rows=2, height=3.4)
        numbers = [int(row["name"].removeprefix("layer ")) for row in layers]
        for key, label, colour in [
            ("residue_norm", "|coarse - base|", SERIES[0]),
            ("instruct_norm", "|instruct - base|", SERIES[1]),
        ]:
            norms.plot(numbers, [row[key] for row in layers], label=label, color=colour, marker="o", markersize=3)
        norms.set_ylim(bottom=0)
        norms.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.4)
        values = [np.nan if row["cosine"] is None else row["cosine"] for row in layers]
        cosines.plot(numbers, values, color=SERIES[2], marker="o", markersize=3)
        cosines.axhline(0, color=INK, linewidth=0.6)
        cosines.set_ylim(-1.05, 1.05)
        cosines.set_ylabel("cosine")
        cosines.set_xlabel("layer")
        return _svg(figure, title)


def timeline_chart(spans: Sequence[Span]) -> str:
    """SVG of what each role and actor did, over seconds since the first span's beginning. A role has one colour.

    What an actor did at the same time lies over itself, and is darker.
    """
    roles = ("driver", "rollout", "reward", "learner", "weights")
    stages = {span.row for span in spans if span.step is not None}
    actors = sorted({span.row.split(" (")[0] for span in spans} - stages)[:MAX_ACTORS]
    rows = sorted([*stages, *actors], key=lambda row: (roles.index(row.split()[0]), row))
    began = min(span.began for span in spans)
    until = max(span.ended or span.began for span in spans)
    with mpl.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, (axes,) = _figure(height=0.7 + 0.24 * len(rows))
        for number, row in enumerate(rows):
            mine = [span for span in spans if span.row.split(" (")[0] == row]
            colour = SERIES[roles.index(row.split()[0])]
            for span in mine:
                bar = (span.began - began, (span.ended or until) - span.began)
                shade = 1.0 if span.step is not None else 0.45
                axes.broken_barh([bar], (number - 0.38, 0.76), facecolors=colour, alpha=shade, linewidth=0)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.xaxis.set_major_locator(MaxNLocator())
        return _svg(figure, "Timeline")


def column(lines: Sequence[MetricsLine], key: str) -> NDArray[np.float64] | None:
    """One metric by step, NaN where a step lacks it; None when every step does."""
    values = np.array([np.nan if line.get(key) is None else line[key] for line in lines], np.float64)
    return None if np.isnan(values).all() else values


def _figure(rows: int = 1, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.6, height), layout="constrained")
    ratios = [3] + [1] * (rows - 1)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, list(axes)


def _draw(axes: Axes, lines: Sequence[MetricsLine], series: Sequence[Series]) -> bool:
    """Draw the series that the steps have; say whether there was any."""
    steps = column(lines, "step")
    found = False
    for key, label, style in series:
        values = column(lines, key)
        if steps is not None and values is not None:
            marker = "o" if np.isfinite(values).sum() < 3 else ""  # a line needs two points to be seen
            axes.plot(steps, values, label=label, marker=marker, markersize=3, **style)
            found = True
    if found and len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, handlelength=1.4)
    return found


def _reward(lines: Sequence[MetricsLine]) -> Figure | None:
    figure, (axes,) = _figure()
    series: list[Series] = [
        ("reward/mean", "sampled", {"color": SERIES[0]}),
        ("reward/greedy_mean", "greedy", {"color": SERIES[1], "linestyle": "--"}),
    ]
    return figure if _draw(axes, lines, series) else None


def _heldout(lines: Sequence[MetricsLine]) -> Figure | None:
    """Rejection sampling's rounds, from before the first; the peak, which was exported, is marked."""
    best = column(lines, "heldout/best_of_n")
    if best is None:
        return None
    figure, (axes,) = _figure()
    before: MetricsLine = {"step": 0, "heldout/best_of_n": lines[0].get("heldout/before")}
    series: list[Series] = [
        ("heldout/best_of_n", "best of each prompt", {"color": SERIES[0]}),
        ("heldout/reward", "mean", {"color": SERIES[1], "linestyle": "--"}),
    ]
    _draw(axes, [before, *lines], series)
    peak = int(np.nanargmax(best))
    axes.plot(
        [float(lines[peak]["step"] or 0)], [best[peak]], marker="o", markersize=7, color=SERIES[0], fillstyle="none"
    )
    axes.set_xlabel("round")
    return figure


def _length(lines: Sequence[MetricsLine]) -> Figure | None:
    figure, (axes, below) = _figure(rows=2, height=3.2)
    series: list[Series] = [
        ("length/mean", "mean", {"color": SERIES[0]}),
        ("length/max", "longest", {"color": SERIES[2], "linewidth": 1}),
        ("length/limit", "limit", {"color": INK, "linewidth": 1.2, "linestyle": ":"}),
    ]
    found = _draw(axes, lines, series)
    axes.set_ylim(bottom=0)
    _draw(below, lines, [("length/truncated", "truncated", {"color": SERIES[3]})])
    below.set_ylim(-0.04, 1.04)
    below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.set_ylabel("truncated")
    return figure if found else None


def _kl(lines: Sequence[MetricsLine]) -> Figure | None:
    figure, (axes,) = _figure()
    axes.set_ylabel("nats per response")
    return figure if _draw(axes, lines, [("kl/sequence", "KL", {"color": SERIES[0]})]) else None


def _critic(lines: Sequence[MetricsLine]) -> Figure | None:
    figure, (axes, below) = _figure(rows=2, height=3.2)
    axes.set_ylabel("loss")
    found = _draw(axes, lines, [("critic/loss", "loss", {"color": SERIES[0]})])
    _draw(below, lines, [("critic/explained_variance", "explained variance", {"color": SERIES[1]})])
    below.set_ylabel("explained")
    return figure if found else None


def _time(lines: Sequence[MetricsLine]) -> Figure | None:
    steps = column(lines, "step")
    found = {stage: column(lines, f"time/{stage}_s") for stage in STAGES}
    stages = {stage: np.nan_to_num(seconds) for stage, seconds in found.items() if seconds is not None}
    if steps is None or not stages:
        return None
    figure, (axes,) = _figure()
    bars = np.array_split(np.arange(len(steps)), min(len(steps), MAX_BARS))
    centres = [steps[bar].mean() for bar in bars]
    bottom = np.zeros(len(bars))
    for (stage, seconds), colour in zip(stages.items(), SERIES, strict=False):
        heights = np.array([seconds[bar].mean() for bar in bars])
        width = 0.86 * (steps[-1] - steps[0] + 1) / len(bars)
        axes.bar(centres, heights, width, bottom, color=colour, label=stage, linewidth=0)
        bottom += heights
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, handlelength=0.9)
    return figure


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": title}):  # a fixed salt per chart also makes the page reproducible
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names that nothing refers to, the same in every chart
    svg = re.sub(r'(<svg [^>]*?) ?width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) ?height="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    for stand_in, variable in CSS_COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", svg)  # hundredths of a point are enough
