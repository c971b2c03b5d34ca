"""The trace that a run leaves, and what `watch` and the report make of it. Times are a clock's of our own."""

import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from rich.console import Console

from c2f_ray.recipe import dump_recipe, load_recipe
from c2f_ray.runtime.trace import Timeline, last_steps, read_trace, spans_of
from c2f_ray.watch.dashboard import frame, sparkline, watch
from c2f_ray.watch.metrics import MetricsLog
from c2f_ray.watch.report import write_report

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
NOW = 1_800_000_000.0


class Clock:
    """`time` for the timeline: moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self) -> float:
        return NOW + self.seconds

    def perf_counter(self) -> float:
        return 50.0 + self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("c2f_ray.runtime.trace.time", clock)
    return clock


def one_step(timeline: Timeline, clock: Clock, step: int) -> None:
    """4 s of rollouts, 1 s until the last score, 5 s of learning."""
    for row, seconds in (("rollout", 4), ("reward", 1), ("learner", 5)):
        with timeline.span(row, step):
            clock.seconds += seconds


def test_the_file_is_a_json_array_but_for_its_bracket_even_while_a_stage_goes_on(tmp_path, clock):
    with Timeline(tmp_path, 3, details=False) as timeline, timeline.span("learner", 1):
        clock.seconds += 2.5
        text = (tmp_path / "trace.json").read_text()
        assert [event["ph"] for event in json.loads(text.rstrip(",\n") + "]")] == ["M", "B"]
    events = json.loads((tmp_path / "trace.json").read_text().rstrip(",\n") + "]")
    learner = [event for event in events if event.get("cat") == "learner"]
    assert [(event["ph"], event["ts"]) for event in learner] == [("B", NOW * 1e6), ("E", (NOW + 2.5) * 1e6)]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert [names[event["tid"]] for event in events if event["ph"] != "M"] == ["learner", "learner", "driver"]


def test_calls_that_overlap_are_drawn_beside_each_other(tmp_path, clock):
    """Three calls of one worker: 0 to 3, 1 to 4, and 3 to 5, which fits behind the first."""
    with Timeline(tmp_path, 3, details=True) as timeline:
        calls = {}
        for second, begun, done in [(0, "a", ""), (1, "b", ""), (3, "", "a"), (3, "c", ""), (4, "", "b"), (5, "", "c")]:
            clock.seconds = second
            if begun:
                calls[begun] = Future()
                timeline.follow(FakeRef(calls[begun]), "reward ultrarm 0", begun)
            else:
                calls[done].set_result(None)
    found = [(span.row, span.name, span.began - NOW, span.ended - NOW) for span in spans_of(read_trace(tmp_path))]
    assert found == [
        ("reward ultrarm 0", "a", 0, 3), ("reward ultrarm 0 (2)", "b", 1, 4), ("reward ultrarm 0", "c", 3, 5),
    ]  # fmt: skip


class FakeRef:
    def __init__(self, result: Future) -> None:
        self.result = result

    def future(self) -> Future:
        return self.result


def test_a_step_that_learns_while_the_next_one_samples(tmp_path, clock):
    """The learner's answer is told late, when it is at the next step already."""
    first, second = Future(), Future()
    with Timeline(tmp_path, 3, details=False) as timeline:
        timeline.span_of_call(FakeRef(first), "learner", 1)
        with timeline.span("rollout", 2):
            clock.seconds = 4
        timeline.span_of_call(FakeRef(second), "learner", 2)
        first.set_result(None)
        clock.seconds = 7
        second.set_result(None)
    found = [
        (span.row, span.step, span.began - NOW, (span.ended or 0) - NOW) for span in spans_of(read_trace(tmp_path))
    ]
    assert found == [("learner", 1, 0, 4), ("rollout", 2, 0, 4), ("learner", 2, 4, 7)]


def test_details_are_left_out_where_the_recipe_does_not_ask(tmp_path, clock):
    with Timeline(tmp_path, 3, details=False) as timeline:
        timeline.add("rollout 0", "8 samples", 50.0)
    assert spans_of(read_trace(tmp_path)) == []


def test_a_killed_run_goes_on_in_the_same_file(tmp_path, clock):
    timeline = Timeline(tmp_path, 2, details=False)
    one_step(timeline, clock, 1)
    with pytest.raises(KeyboardInterrupt), timeline.span("rollout", 2):
        clock.seconds += 3
        torn = (tmp_path / "trace.json").read_text() + '{"cat": "roll'
        raise KeyboardInterrupt
    (tmp_path / "trace.json").write_text(torn)  # as SIGKILL leaves it: the stage has no end
    clock.seconds = 100.0
    with Timeline(tmp_path, 2, details=False) as timeline:
        one_step(timeline, clock, 2)
    spans = spans_of(read_trace(tmp_path))
    rows = [(span.row, span.step, span.began - NOW, span.ended - NOW) for span in spans if span.row == "rollout"]
    assert rows == [("rollout", 1, 0, 4), ("rollout", 2, 10, 10), ("rollout", 2, 100, 104)]
    tids = [event["tid"] for event in read_trace(tmp_path) if event["ph"] == "M"]
    assert len(tids) == len(set(tids)) == 4  # no row twice
    assert {span.step for span in last_steps(spans, 1)} == {2}


@pytest.fixture
def run(tmp_path, clock) -> Iterator[Path]:
    """Two steps, the second of which is learning; a note."""
    folder = tmp_path / "cats"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(TINY)))
    timeline = Timeline(folder, 36, details=False)
    one_step(timeline, clock, 1)
    log = MetricsLog(folder)
    log.write({"step": 1, "reward/mean": 0.5, "length/limit": 16, "time/step_s": 10.0, "time/rollout_s": 4.0,
               "time/reward_s": 1.0, "time/learner_s": 5.0, "time/samples_per_s": 12.8})  # fmt: skip
    log.close()
    timeline.note("rollout actor 0 is replaced: it died\nand a long traceback")
    with timeline.span("rollout", 2):
        clock.seconds += 6
    with timeline.span("learner", 2):
        clock.seconds += 4
        yield folder


def shown(folder: Path, now: float) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(frame(folder, load_recipe(folder / "recipe.yaml"), now))
    return console.file.getvalue()


def test_a_frame_says_how_the_run_goes(run, clock):
    text = shown(run, clock.time())
    assert "step 1/36" in text
    assert "last sign 0:00:04 ago" in text
    assert "about 0:05:50 left" in text
    bars = dict(re.findall(r"(rollout|reward|learner) +([█▏·]{60})", text))
    # 20 s in 60 characters: rollout from 0 to 4 and from 10 to 16, learner from 5 to 10 and from 16 on.
    assert bars["rollout"] == "█" * 12 + "·" * 18 + "█" * 18 + "·" * 12
    assert bars["reward"] == "·" * 12 + "█" * 3 + "·" * 45
    assert bars["learner"] == "·" * 15 + "█" * 15 + "·" * 18 + "█" * 12
    assert re.search(r"rollout +1 +0 +50%", text)
    assert re.search(r"learner +2 +0 +45% +learner, 4 s", text)
    assert "rollout actor 0 is replaced: it died" in text
    assert "traceback" not in text


def test_a_run_that_has_ended_says_so_and_watching_it_ends(run, clock, monkeypatch):
    with pytest.raises(ValueError), Timeline(run, 36, details=False):
        raise ValueError("the disk is full")
    assert "stopped at" in shown(run, clock.time() + 1e6)
    assert "stopped: ValueError: the disk is full" in shown(run, clock.time())
    out = io.StringIO()
    monkeypatch.setattr("c2f_ray.watch.dashboard.time.sleep", lambda _: pytest.fail("goes on after the end"))
    watch(run, once=False, console=Console(file=out, force_terminal=True, width=120))
    assert "step 1/36" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_a_run_without_a_step_has_a_frame(tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(TINY)))
    assert "step 0/?" in shown(tmp_path, NOW)
    assert "has not begun to train" in shown(tmp_path, NOW)


def test_a_curve_has_the_means_of_equal_parts():
    assert sparkline([0.0, 7.0, 3.0]) == "▁█▄"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert sparkline([i // 2 for i in range(120)])[:9] == "".join("▁▁▁▁▁▂▂▂▂")
    assert len(sparkline(list(range(1000)))) == 60


def test_the_report_has_the_last_two_steps(tmp_path, clock):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(TINY)))
    with Timeline(tmp_path, 3, details=True) as timeline:
        for step in (1, 2, 3):
            one_step(timeline, clock, step)
            timeline.add(f"rollout actor {step}", "8 samples", clock.perf_counter() - 1)
    page = write_report(tmp_path).read_text()
    chart = page[page.index("Timeline of the last steps") :].split("</svg>")[0]
    labels = re.findall(r">([a-z][a-z0-9 ]+)</text>", chart)
    assert labels == ["seconds", "rollout", "rollout actor 2", "rollout actor 3", "reward", "learner"]
