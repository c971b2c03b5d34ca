"""What a run did, on one page: `report.html`, with nothing to load from anywhere, and the evaluation table.

Invariant: all text that a model or a user wrote is escaped, and the page's policy forbids scripts and requests.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

from c2f_ray.data.atomic import write_text
from c2f_ray.runtime.trace import last_steps, read_trace, spans_of
from c2f_ray.runtime.watchdog import duration
from c2f_ray.watch.charts import charts, column, compare, diagnosis_chart, timeline_chart
from c2f_ray.watch.metrics import MetricsLine, read_metrics

# Columns of the evaluation table: key in `metrics`, title, format. Others that a grader returns come after them.
COLUMNS = [
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("strict", "strict", "{:.1%}"),
    ("length", "length", "{:.1f}"),
    ("truncated", "truncated", "{:.1%}"),
    ("distinct_4", "distinct-4", "{:.3f}"),
    ("repeated_lines", "repeated lines", "{:.1%}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("kl_to_instruct", "KL to instruct", "{:.4f}"),
    ("win_rate", "win rate", "{:.1%}"),
    ("mt_bench", "MT-Bench", "{:.2f}"),
    ("tasks", "tasks", "{:.3f}"),
]
STEPS_IN_TIMELINE = 2
NUM_PROMPTS = 6  # shown with their responses
MAX_SHOWN = 6000  # characters of one response
ROW_FACTS = {"step", "sample_id", "prompt_id", "greedy", "finished", "reward", "weight_version"}
ROW_FACTS |= {"prompt", "response", "response_tokens"}

Row = dict[str, Any]  # of a Parquet file


def write_report(run_folder: Path, beside: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` into a run's folder, from the files that are there, and return its path.

    The runs in the folders ``beside`` are drawn into charts together with this one.
    """
    sections: dict[str, Any] = {}
    missing: list[str] = []

    def section(name: str, content: Any, why_missing: str) -> None:
        sections[name] = content
        if not content:
            missing.append(why_missing)

    metrics_path = run_folder / "metrics.jsonl"
    lines = read_metrics(metrics_path) if metrics_path.is_file() else []
    evaluation_path = run_folder / "evaluation.json"
    evaluation = json.loads(evaluation_path.read_text()) if evaluation_path.is_file() else {}
    recipe = run_folder / "recipe.yaml"
    drawn = charts(lines)
    if spans := last_steps(spans_of(read_trace(run_folder)), STEPS_IN_TIMELINE):
        drawn["Timeline of the last steps"] = timeline_chart(spans)
    section("charts", {k: Markup(svg) for k, svg in drawn.items()}, "charts: metrics.jsonl has no steps yet")
    others = {folder.resolve().name: read_metrics(folder / "metrics.jsonl") for folder in beside}
    compared = compare({run_folder.resolve().name: lines, **others}) if others else {}
    sections["compared"] = {k: Markup(svg) for k, svg in compared.items()}
    section("evaluation", evaluation and _table(evaluation), "evaluation: there is no evaluation.json")
    section("merge", _diagnosis(run_folder), "merge: there is no diagnosis.json of a method that reads the base model")
    section("responses", _responses(run_folder, evaluation), "responses: there is nothing in evaluation/")
    section("training", _training_samples(run_folder), "samples from training: there is nothing in trajectories/")
    section("recipe", recipe.read_text() if recipe.is_file() else "", "recipe: there is no recipe.yaml")

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=run_folder.resolve().name, tiles=_tiles(lines, evaluation), missing=missing, **sections
    )
    path = run_folder / "report.html"
    write_text(path, page)
    return path


def format_table(evaluation: Mapping[str, Any]) -> Group:
    """The evaluation as tables for the terminal; the best fine actor is marked, and each one's verdict is below."""
    content = _table(evaluation)
    verdicts = Text("\n".join(f"{name} {verdict}" for name, verdict in content["verdicts"].items()))
    return Group(_terminal(content, verdicts), *(_terminal(table) for table in content["judged"]))


def _terminal(content: Mapping[str, Any], below: Text | None = None) -> Table:
    table = Table(title=content["caption"], title_justify="left", caption=below, caption_justify="left")
    table.add_column("model", no_wrap=True)
    for title in content["titles"]:
        table.add_column(title, justify="right")
    for row in content["rows"]:
        best = row.get("best", False)
        table.add_row(Text(row["name"] + (" *" if best else "")), *row["cells"], style="bold" if best else "")
    return table


def _table(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Titles, rows of formatted cells and a caption; a column that no model has is left out."""
    models = evaluation["models"]
    found = {key: None for model in models for key, value in model["metrics"].items() if value is not None}
    columns = [entry for entry in COLUMNS if entry[0] in found]
    listed = {key for key, _, _ in COLUMNS}
    columns += [(key, key.removeprefix("task/"), "{:.3f}") for key in found if key not in listed]
    rows = [
        {
            "name": model["name"],
            "best": model["name"] == evaluation["best"],
            "cells": [_cell(model["metrics"].get(key), form) for key, _, form in columns],
        }
        for model in models
    ]
    caption = f"Held-out prompts, greedy responses of up to {evaluation['max_tokens']} tokens"
    if evaluation["best"]:
        caption += "; * marks the best fine actor"
    return {
        "titles": [title for _, title, _ in columns],
        "rows": rows,
        "caption": caption,
        "verdicts": evaluation.get("verdicts", {}),
        "judged": [table(evaluation) for key, table in JUDGED.items() if key in evaluation],
    }


def _win_rates(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Every model's answers beside those of one of them."""
    columns = [
        ("win_rate", "win rate", "{:.1%}"),
        ("low", "from", "{:.1%}"),
        ("high", "to", "{:.1%}"),
        *((key, key, "{:d}") for key in ("wins", "ties", "losses")),
        ("left_out", "left out", "{:d}"),
        ("characters", "characters", "{:.0f}"),
        ("characters_against", "of the other", "{:.0f}"),
    ]
    found = evaluation["win_rates"]
    caption = (
        f"Against {found['against']}, by {found['judge']}: a tie is half a win; from and to bound the 95% bootstrap "
        "interval; characters are an answer's mean length; pairs with a verdict that was none are left out"
    )
    return _judged_table(found["models"], columns, caption)


def _mt_bench(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of two-turn questions, by category."""
    found = evaluation["mt_bench"]
    rows = {
        name: {**row, **row["categories"], "first": row["turns"][0], "second": row["turns"][1]}
        for name, row in found["models"].items()
    }
    categories = list(next(iter(found["models"].values()))["categories"])
    columns = [("mean", "mean", "{:.2f}"), ("spread", "spread", "{:.2f}")]
    columns += [(key, title, "{:.2f}") for key, title in (("first", "first turn"), ("second", "second turn"))]
    columns += [*((category, category, "{:.2f}") for category in categories), ("left_out", "left out", "{:d}")]
    caption = (
        f"Scores from 1 to 10 by {found['judge']} over {found['runs']} runs, and the standard deviation between these; "
        "verdicts that were none are left out"
    )
    return _judged_table(rows, columns, caption)


JUDGED = {"win_rates": _win_rates, "mt_bench": _mt_bench}


def _judged_table(
    models: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple[str, str, str]], caption: str
) -> dict[str, Any]:
    rows = [
        {"name": name, "cells": [_cell(row[key], form) for key, _, form in columns]} for name, row in models.items()
    ]
    return {"titles": [title for _, title, _ in columns], "rows": rows, "caption": caption}


def _diagnosis(run_folder: Path) -> dict[str, Any]:
    """What the coarse actor changed beside the instruct model: a table, a row for each layer, and its chart."""
    path = run_folder / "diagnosis.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text())["rows"]
    columns = [("residue_norm", "{:.4g}"), ("instruct_norm", "{:.4g}"), ("cosine", "{:.3f}")]
    return {
        "titles": ["|coarse - base|", "|instruct - base|", "cosine"],
        "rows": [{"name": row["name"], "cells": [_cell(row[key], form) for key, form in columns]} for row in rows],
        "chart": Markup(diagnosis_chart(rows)),
    }


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _tiles(lines: Sequence[MetricsLine], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run in a few numbers: title and value."""
    tiles: list[tuple[str, str]] = []
    if lines:
        tiles.append(("steps", f"{lines[-1]['step']:.0f}"))
    for key, title, form in [
        ("reward/mean", "sampled reward", "{:.2f}"),
        ("length/mean", "mean length", "{:.0f}"),
        ("length/limit", "length limit", "{:.0f}"),
    ]:
        first, last = (lines[0].get(key), lines[-1].get(key)) if lines else (None, None)
        if first is not None and last is not None:
            tiles.append((title, f"{form.format(first)} → {form.format(last)}"))
    seconds = column(lines, "time/step_s")
    if seconds is not None:
        tiles.append(("time in steps", duration(float(sum(seconds[seconds > 0])))))
    if evaluation.get("best"):
        tiles.append(("best fine actor", evaluation["best"]))
    return tiles


def _responses(run_folder: Path, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For some held-out prompts, spread over all, the responses of base, coarse and the best fine actor."""
    files = {
        name: run_folder / "evaluation" / f"{name}.parquet"
        for name in ("base", "coarse", evaluation.get("best"))
        if name is not None
    }
    rows = {name: pq.read_table(file).to_pylist() for name, file in files.items() if file.is_file()}
    if not rows:
        return []
    by_prompt = {name: {row["prompt_id"]: row for row in its_rows} for name, its_rows in rows.items()}
    first, *others = by_prompt.values()
    shared = [prompt_id for prompt_id in first if all(prompt_id in other for other in others)]
    count = min(NUM_PROMPTS, len(shared))
    chosen = [shared[i * len(shared) // count] for i in range(count)]
    return [
        {
            "heading": f"Prompt {prompt_id}",
            "prompt": first[prompt_id]["prompt"],
            "answers": [_answer(name, by_id[prompt_id]) for name, by_id in by_prompt.items()],
        }
        for prompt_id in chosen
    ]


def _training_samples(run_folder: Path) -> list[dict[str, Any]]:
    """The best and the worst sample of the first, the middle and the last step."""
    files = sorted((run_folder / "trajectories").glob("step_*.parquet"))
    chosen = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    samples = []
    for file in [files[i] for i in chosen]:
        rows = [row for row in pq.read_table(file).to_pylist() if not row["greedy"]]
        if rows:
            ranked = sorted(rows, key=lambda row: (row["reward"], row["sample_id"]))
            answers = [(ranked[-1], "highest reward"), (ranked[0], "lowest reward")]
            samples.append(
                {
                    "heading": f"Step {rows[0]['step']}",
                    "answers": [_answer(title, row) | {"prompt": row["prompt"]} for row, title in answers],
                }
            )
    return samples


def _answer(title: str, row: Row) -> dict[str, str]:
    facts = [f"reward {row['reward']:.3f}", f"{row['response_tokens']} tokens"]
    if not row["finished"]:
        facts.append("cut by the limit")
    graded = {key: value for key, value in row.items() if key not in ROW_FACTS and isinstance(value, int | float)}
    facts += [f"{key} {value:g}" for key, value in graded.items()]
    text = row["response"]
    if len(text) > MAX_SHOWN:
        text = f"{text[:MAX_SHOWN]}\n[... {len(text) - MAX_SHOWN} more characters]"
    return {"title": title, "facts": " · ".join(facts), "text": text}
