"""What each role of a run did, and when: `trace.json` in the run's folder.

The file is in the Trace Event format, an array with one event per line and, as the format allows, no closing bracket:
Perfetto (ui.perfetto.dev) and chrome://tracing open it at any moment. Stages are there always; single shards and
scoring calls, which are many, where `run.trace` asks for them.

Invariants: a line is flushed as its event happens; events of one row never overlap, what runs at the same time gets
rows beside it; a run that goes on appends, and its clock is the wall's, so that what was done again is there twice.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any

TAIL_BYTES = 2**20  # of a long run's file: enough for its last steps

Event = dict[str, Any]


class Timeline:
    """Times that are passed in are `time.perf_counter`'s."""

    def __init__(self, folder: Path, total_steps: int, *, details: bool) -> None:
        """``details``: every shard and scoring call, too."""
        path = folder / "trace.json"
        before = path.read_text() if path.exists() else ""
        events = _parse(before)
        self.details = details
        self._total_steps = total_steps
        self._rows: dict[str, int] = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
        self._step: dict[str, int] = {}  # by row: of the stage that goes on
        self._ended: dict[str, float] = {}  # by row: when its last detail did
        self._zero = time.time() - time.perf_counter()
        self._lock = RLock()  # results of calls are told by Ray's own thread
        path.write_text(before[: before.rfind("\n") + 1] or "[\n")  # without a line that a crash cut short
        self._file = path.open("a")
        for span in spans_of(events):
            if span.ended is None:  # what a killed run was at ended with it
                self._write(span.row, {"ph": "E", "ts": max(_end(event) for event in events)})

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.note(f"stopped: {kind.__name__}: {error}" if kind else "ended")
        with self._lock:
            self._file.close()

    @contextmanager
    def span(self, row: str, step: int, name: str = "") -> Iterator[None]:
        """A stage of a step, on the row of its role."""
        self._begin(row, step, name or row)
        try:
            yield
        finally:
            self._end(row, step)

    def span_of_call(self, ref: Any, row: str, step: int) -> None:
        """A stage that begins now, and ends when the result of an actor's call is there."""
        self._begin(row, step, row)
        ref.future().add_done_callback(lambda _: self._end(row, step))

    def _begin(self, row: str, step: int, name: str) -> None:
        with self._lock:
            if row in self._step:  # the end of its last stage is told late
                self._end(row, self._step[row])
            self._step[row] = step
            shown = {"name": name, "args": {"step": step, "of": self._total_steps}}
            self._write(row, {"ph": "B", "ts": self._micros(time.perf_counter())} | shown)

    def _end(self, row: str, step: int) -> None:
        with self._lock:
            if self._step.get(row) == step:
                del self._step[row]
                self._write(row, {"ph": "E", "ts": self._micros(time.perf_counter())})

    def add(self, row: str, name: str, began: float) -> None:
        """A detail that has just ended."""
        if not self.details:
            return
        ended = time.perf_counter()
        with self._lock:
            lane, number = row, 1
            while self._ended.get(lane, began) > began:  # that one is at something else
                number += 1
                lane = f"{row} ({number})"
            self._ended[lane] = ended
        ts = self._micros(began)
        self._write(lane, {"ph": "X", "ts": ts, "dur": self._micros(ended) - ts, "name": name})

    def follow(self, ref: Any, row: str, name: str) -> None:
        """A detail that begins now, and ends when the result of an actor's call is there."""
        if self.details:
            began = time.perf_counter()
            ref.future().add_done_callback(lambda _: self.add(row, name, began))

    def note(self, line: str) -> None:
        """Something that a person should know of."""
        self._write("driver", {"ph": "i", "s": "g", "ts": self._micros(time.perf_counter()), "name": line})

    def _micros(self, seconds: float) -> int:
        return round((self._zero + seconds) * 1e6)

    def _write(self, row: str, event: Event) -> None:
        with self._lock:
            if self._file.closed:  # a result that came after the end
                return
            if row not in self._rows:
                self._rows[row] = len(self._rows) + 1
                named = {"ph": "M", "name": "thread_name", "pid": 1, "tid": self._rows[row], "args": {"name": row}}
                self._file.write(json.dumps(named) + ",\n")
            self._file.write(json.dumps({"cat": row, "pid": 1, "tid": self._rows[row]} | event) + ",\n")
            self._file.flush()


@dataclass(frozen=True)
class Span:
    row: str
    name: str
    began: float  # seconds since 1970
    ended: float | None  # None: it goes on
    step: int | None  # a detail has none
    total_steps: int | None


def read_trace(folder: Path) -> list[Event]:
    """The events at the end of a run's trace, oldest first; none where it has no trace."""
    path = folder / "trace.json"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL_BYTES)
        file.seek(start)
        text = file.read().decode(errors="ignore")
    return _parse(text[text.find("\n") + 1 :])  # the first line is the bracket, or the rest of one


def _parse(text: str) -> list[Event]:
    """Complete lines only: a complete one ends with a newline."""
    return [json.loads(line.rstrip(",")) for line in text.split("\n")[:-1] if line.startswith("{")]


def spans_of(events: Sequence[Event]) -> list[Span]:
    """Stages and details, by their beginning."""
    spans: list[Span] = []
    open_spans: dict[str, int] = {}  # by row: where in `spans`
    for event in events:
        row, began = event.get("cat", ""), event.get("ts", 0) / 1e6
        if event["ph"] == "B":
            open_spans[row] = len(spans)
            spans.append(Span(row, event["name"], began, None, event["args"]["step"], event["args"]["of"]))
        elif event["ph"] == "E" and row in open_spans:
            number = open_spans.pop(row)
            spans[number] = replace(spans[number], ended=began)
        elif event["ph"] == "X":
            spans.append(Span(row, event["name"], began, _end(event) / 1e6, None, None))
    return sorted(spans, key=lambda span: span.began)


def _end(event: Event) -> int:
    return event.get("ts", 0) + event.get("dur", 0)


def last_steps(spans: Sequence[Span], count: int) -> list[Span]:
    """The spans of the last ``count`` steps of the run's last start, and what else began with them or later."""
    steps = sorted({span.step for span in spans if span.step})[-count:]
    began = [span.began for span in spans if span.step in steps]
    return [span for span in spans if began and span.began >= min(began)]
