import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from c2f_ray.runtime.watchdog import duration
from c2f_ray.watch.metrics import MetricsLog, read_metrics, without_timing
from c2f_ray.watch.progress import Progress
from c2f_ray.watch.report import format_table, write_report


def line(step: int, **changes: float) -> dict[str, float]:
    return {
        "step": step,
        "reward/mean": step / 8,
        "reward/greedy_mean": step / 4,
        "length/limit": 16 * step,
        "length/mean": 10.0 * step,
        "length/max": 16 * step,
        "length/truncated": 0.25,
        "kl/sequence": 0.125,
        "time/rollout_s": 2.0,
        "time/learner_s": 1.0,
        "time/step_s": 3.0,
        "time/samples_per_s": 40.0,
    } | changes


# metrics.jsonl and TensorBoard


def tensorboard_steps(folder: Path, key: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(key)}


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(line(1))
    log.write(line(2))
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(1), line(2)]
    log.close()
    assert tensorboard_steps(tmp_path, "reward/mean") == {1: 0.125, 2: 0.25}


def test_resuming_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(line(step))
    log.close()
    two_lines = "".join(path.read_text().splitlines(keepends=True)[:2])
    with path.open("a") as file:
        file.write('{"step": 4, "rew')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]

    time.sleep(1 - time.time() % 1)  # TensorBoard reads files in the order of the seconds that they were made in
    log = MetricsLog(tmp_path, step=2)
    assert path.read_text() == two_lines  # byte for byte what the first run wrote
    log.write(line(3, **{"reward/mean": 7.0}))
    log.close()
    assert [entry["reward/mean"] for entry in read_metrics(path)] == [0.125, 0.25, 7.0]
    assert tensorboard_steps(tmp_path, "reward/mean") == {1: 0.125, 2: 0.25, 3: 7.0}


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(line(1, **{"kl/sequence": float("nan")}))
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["kl/sequence"] is None


def test_two_runs_agree_but_for_their_timing():
    slow = line(1, **{"time/rollout_s": 9.0, "time/samples_per_s": 4.0})
    assert slow != line(1)
    assert without_timing(slow) == without_timing(line(1))
    assert len(without_timing(slow)) == 8


# progress


def test_a_log_gets_one_plain_line_per_step_and_each_stage_once(monkeypatch):
    clock = iter([100.0, 110.0, 120.0])  # begun, then read when each step ends
    monkeypatch.setattr("c2f_ray.watch.progress.time.monotonic", lambda: next(clock))
    out = io.StringIO()
    with Progress(8, Console(file=out, width=40)) as progress:
        for step in (3, 4):  # resumed after step 2: only this session's steps are timed
            progress.stage("rollout")
            progress.stage("learner")
            progress.step(line(step))
    assert out.getvalue().splitlines() == [
        "rollout ...",
        "learner ...",
        "step 3/8  reward 0.375 (greedy 0.750)  length 30  limit 48  truncated 25%  kl 0.125  samples/s 40.0"
        "  left 0:00:50",
        "step 4/8  reward 0.500 (greedy 1.000)  length 40  limit 64  truncated 25%  kl 0.125  samples/s 40.0"
        "  left 0:00:40",
    ]


def test_a_terminal_gets_a_live_panel():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=30, _environ={"TERM": "xterm"})
    with Progress(8, console) as progress:
        progress.stage("weights")
        progress.step(line(2))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    last = shown[shown.rindex("c2f_ray") :]
    assert re.search(r"stage +weights", last)
    assert "2/8" in last
    assert re.search(r"reward +0\.250 \(greedy 0\.500\)", last)


def test_durations_are_rounded_before_they_are_split():
    assert duration(59.6) == "0:01:00"
    assert duration(3725) == "1:02:05"
    assert duration(100 * 3600) == "100:00:00"


# report

HOSTILE = "</pre><script>alert('x')</script><img src=http://elsewhere/x.png>"
EVALUATION = {
    "max_tokens": 128,
    "best": "residue-0.4",
    "verdicts": {"residue-0.4": "chosen: <most>", "residue-0.8": "lost: too much"},
    "models": [
        {"name": "base", "folder": "b", "metrics": {"reward": -1.0, "length": 20.0, "distinct_4": None}},
        {"name": "coarse@96", "folder": "c", "metrics": {"reward": 0.5, "length": 96.0, "distinct_4": 0.25}},
        {"name": "residue-0.4", "folder": "f", "metrics": {"reward": 1.25, "length": 40.0, "distinct_4": 0.875}},
    ],
}


def answer(prompt_id: str, response: str, **more) -> dict:
    row = {"prompt_id": prompt_id, "prompt": f"prompt {prompt_id}", "response": response, "reward": 1.0}
    return row | {"finished": True, "response_tokens": 5} | more


def fill_run(run: Path) -> None:
    (run / "evaluation").mkdir(parents=True)
    (run / "trajectories").mkdir()
    (run / "recipe.yaml").write_text("run:\n  name: <b>bold</b>\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 2, 3)))
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    deltas = [("layer 0", 0.25, 1.5, -0.5), ("layer 1", 0.5, 2.0, 0.125), ("norm", 0.0, 1.0, None)]
    keys = ("name", "residue_norm", "instruct_norm", "cosine")
    diagnosis = {"rows": [dict(zip(keys, row, strict=True)) for row in deltas]}
    (run / "diagnosis.json").write_text(json.dumps(diagnosis))
    for name, said in [("base", HOSTILE), ("coarse", "again\n" * 2000), ("residue-0.4", "just right")]:
        rows = [answer("q1", said, strict=1.0), answer("q2", f"{name} on q2", finished=False)]
        pq.write_table(pa.Table.from_pylist(rows), run / "evaluation" / f"{name}.parquet")
    for step in (1, 2, 3):
        rows = [
            answer("t", f"step {step} sample {i}", step=step, sample_id=i, greedy=i == 3, reward=[0, 2, 1, 9][i] + 0.5)
            for i in range(4)
        ]
        pq.write_table(pa.Table.from_pylist(rows), run / "trajectories" / f"step_{step:06d}.parquet")


class Page(HTMLParser):
    """Tags, attributes and the text of headings, cells and preformatted blocks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {"pre": [], "h2": [], "h3": [], "td": [], "th": [], "li": []}
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in self.texts:
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag in self.texts:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data


def test_the_report_shows_what_the_run_wrote(tmp_path):
    run = tmp_path / "myrun"
    fill_run(run)
    page = Page(write_report(run).read_text())
    assert page.texts["h2"] == [
        "Evaluation",
        "Training",
        "What the coarse actor changed",
        "Responses to held-out prompts",
        "Samples during training",
        "Recipe",
    ]
    assert page.tags.count("svg") == 5
    models = ["model", "reward", "length", "distinct-4", "base", "coarse@96", "residue-0.4 *"]
    deltas = ["part", "|coarse - base|", "|instruct - base|", "cosine", "layer 0", "layer 1", "norm"]
    assert page.texts["th"] == [*models, "residue-0.4", "residue-0.8", *deltas]
    assert page.texts["td"][:9] == ["-1.000", "20.0", "-", "0.500", "96.0", "0.250", "1.250", "40.0", "0.875"]
    assert page.texts["td"][9:11] == ["chosen: <most>", "lost: too much"]
    assert page.texts["td"][11:] == ["0.25", "1.5", "-0.500", "0.5", "2", "0.125", "0", "1", "-"]
    pre = page.texts["pre"]
    assert pre[:4] == ["prompt q1", HOSTILE, "again\n" * 1000 + "\n[... 6000 more characters]", "just right"]
    assert pre[4:8] == ["prompt q2", "base on q2", "coarse on q2", "residue-0.4 on q2"]
    # The best and the worst sampled response of each step; sample 3 is the greedy one.
    assert [text for text in pre if text.startswith("step")] == [
        f"step {step} sample {i}" for step in (1, 2, 3) for i in (1, 0)
    ]
    assert pre[-1] == "run:\n  name: <b>bold</b>\n"
    assert page.texts["li"] == []


def test_what_a_judge_found_has_tables_of_its_own(tmp_path):
    fill_run(tmp_path)
    counts = {"wins": 7, "ties": 2, "losses": 1, "left_out": 3, "characters": 1478.4, "characters_against": 900.0}
    pairs = {"residue-0.4": {"win_rate": 0.8, "low": 0.625, "high": 0.95, **counts}}
    scores = {"mean": 7.85, "spread": None, "runs": [7.85], "turns": [8.2, 7.5], "left_out": 4}
    judged = {
        "win_rates": {"against": "instruct", "judge": "gpt", "models": pairs},
        "mt_bench": {
            "judge": "gpt",
            "runs": 1,
            "models": {"base": scores | {"categories": {"maths": 5.5, "stem": None}}},
        },
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION | judged))
    page = Page(write_report(tmp_path).read_text())
    assert page.texts["td"][11:20] == ["80.0%", "62.5%", "95.0%", "7", "2", "1", "3", "1478", "900"]
    assert page.texts["td"][20:27] == ["7.85", "-", "8.20", "7.50", "5.50", "-", "4"]
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as captured:
        console.print(format_table(EVALUATION | judged))
    assert "8.20" in captured.get()
    titles = ["model", "mean", "spread", "first turn", "second turn", "maths", "stem", "left out", "base"]
    assert titles == page.texts["th"][20:29]


def test_several_runs_are_drawn_side_by_side(tmp_path):
    for name in ("remax", "ppo"):
        fill_run(tmp_path / name)
    steps = [line(step) | {"critic/loss": 0.5 / step, "critic/explained_variance": 0.1 * step} for step in (1, 2)]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    html = write_report(tmp_path / "ppo", [tmp_path / "remax"]).read_text()
    page = Page(html)
    assert page.texts["h2"][1:3] == ["Training", "Beside other runs"]
    assert page.texts["h3"][:10] == [
        "Reward", "Response length (tokens)", "KL to the reference policy", "Critic", "Time per step (s)",
        "Sampled reward of each run", "Mean response length of each run (tokens)", "KL of each run (nats per response)",
        "Time of each run's updates (s)", "Norms and cosine of the deltas by layer",
    ]  # fmt: skip
    assert html.count(">remax<") == html.count(">ppo<") == 4, "one legend in each chart"
    assert "Beside other runs" not in write_report(tmp_path / "ppo").read_text()


def test_the_report_loads_nothing_and_runs_nothing(tmp_path):
    run = tmp_path / "myrun"
    fill_run(run)
    html = write_report(run).read_text()
    page = Page(html)
    assert not {"script", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("#", "data:")) for value in links)
    assert not re.search(r"url\((?!#)", html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10  # five charts in one document
    # Every stand-in colour has become a variable of the theme.
    assert "#00ff0" not in html
    assert "var(--series-1)" in html
    assert write_report(run).read_text() == html
    assert sorted(path.name for path in run.glob("report*")) == ["report.html"]


def test_an_unfinished_run_has_a_report_that_says_what_is_missing(tmp_path):
    run = tmp_path / "young"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.5, "kl/sequence": None}) + "\n")
    page = Page(write_report(run).read_text())
    assert page.texts["h2"] == ["Training"]
    assert page.texts["h3"] == ["Reward"]
    assert [text.split(":")[0] for text in page.texts["li"]] == [
        "evaluation",
        "merge",
        "responses",
        "samples from training",
        "recipe",
    ]


def test_the_terminal_shows_the_same_table():
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as captured:
        console.print(format_table(EVALUATION))
    lines = captured.get().splitlines()
    assert [line.strip() for line in lines[-2:]] == ["residue-0.4 chosen: <most>", "residue-0.8 lost: too much"]
    rows = [re.split(r"[│┃]", row)[1:-1] for row in lines if row[0] in "│┃"]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["model", "reward", "length", "distinct-4"],
        ["base", "-1.000", "20.0", "-"],
        ["coarse@96", "0.500", "96.0", "0.250"],
        ["residue-0.4 *", "1.250", "40.0", "0.875"],
    ]
