"""What a person sees while a run goes on: a live panel on a terminal, one plain line per step in a job's log."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from c2f_ray.runtime.trace import Timeline
from c2f_ray.runtime.watchdog import duration


class Progress:
    """``with Progress(total_steps) as progress``, then ``stage`` as a stage begins and ``step`` as a step ends."""

    def __init__(self, total_steps: int, console: Console | None = None, timeline: Timeline | None = None) -> None:
        self._total_steps = total_steps
        self._console = console or Console()
        self._timeline = timeline
        self._live: Live | None = None
        self._stage = "starting"
        self._stages_seen: set[str] = set()
        self._metrics: Mapping[str, float] = {}
        self._steps_timed = 0
        self._started = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str) -> None:
        """A stage begins. A log without a terminal shows each stage's first time only: it may take minutes."""
        self._stage = name
        if self._live is None and name not in self._stages_seen:
            self._print(f"{name} ...")
        self._stages_seen.add(name)

    def step(self, metrics: Mapping[str, float]) -> None:
        """A step ended; ``metrics`` is its line in metrics.jsonl, ``step`` included."""
        self._metrics = metrics
        self._steps_timed += 1
        if self._live is None:
            self._print("  ".join(f"{name} {value}" for name, value in self._facts()))

    def note(self, line: str) -> None:
        """One line that stays, above the panel or in the log, and in the run's trace."""
        self._print(line)
        if self._timeline is not None:
            self._timeline.note(line)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _facts(self) -> list[tuple[str, str]]:
        """Names and values to show, of those metrics that this run has."""
        m = self._metrics
        facts = [("step", f"{m.get('step', 0):.0f}/{self._total_steps}")]
        if "reward/mean" in m:
            greedy = f" (greedy {m['reward/greedy_mean']:.3f})" if "reward/greedy_mean" in m else ""
            facts.append(("reward", f"{m['reward/mean']:.3f}{greedy}"))
        for key, name, form in [
            ("length/mean", "length", "{:.0f}"),
            ("length/limit", "limit", "{:.0f}"),
            ("length/truncated", "truncated", "{:.0%}"),
            ("kl/sequence", "kl", "{:.3g}"),
            ("time/samples_per_s", "samples/s", "{:.1f}"),
        ]:
            if key in m:
                facts.append((name, form.format(m[key])))
        if self._steps_timed:
            seconds = (time.monotonic() - self._started) / self._steps_timed
            facts.append(("left", duration(seconds * (self._total_steps - m["step"]))))
        return facts

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        table.add_row("stage", Text(self._stage, style="bold"))
        (_, steps), *facts = self._facts()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(steps, ProgressBar(self._total_steps, self._metrics.get("step", 0), width=40))
        table.add_row("step", bar)
        for name, value in facts:
            table.add_row(name, value)
        return Panel(table, title="c2f_ray", title_align="left", border_style="dim", expand=False)


def table_console() -> Console:
    """For tables, which do not fit into the 80 columns that a log is taken to have."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 140))
