"""examples/sweep_length_rules.py, and the report of its runs; test_chain.py and test_pipeline.py run the other two."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from c2f_ray.cli import app
from c2f_ray.watch.metrics import read_metrics
from tests.documented import documented

SETTINGS = [
    "run.steps=2", "prompts.per_step=4", "learner.ranks=1", "length.max_tokens=40",
    "reward={kind: function, function: 'examples.my_rewards:score'}",
]  # fmt: skip


def test_a_sweep_over_length_rules_and_a_report_of_its_curves(
    cluster: None, checkout: Callable[[str], Path], monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(checkout("sweep"))
    script, recipe = documented("python examples/sweep_length_rules.py configs/tiny.yaml")
    monkeypatch.setattr("sys.argv", [script, recipe, *SETTINGS])
    runpy.run_path(script, run_name="__main__")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("runs/length_")]
    assert [line.split(":")[0] for line in said] == ["runs/length_fixed", "runs/length_linear", "runs/length_logistic"]
    limits = {
        name: [line["length/limit"] for line in read_metrics(Path(f"runs/length_{name}/metrics.jsonl"))]
        for name in ("fixed", "linear", "logistic")
    }
    assert limits["fixed"] == [40, 40]
    assert limits["linear"] == [16, 17]  # 24 tokens in 24 steps
    assert limits["logistic"] == [16, 18]  # p is a half, of 5 tokens
    assert all(line.endswith(f"limit {limits[line.split(':')[0][12:]][-1]}") for line in said)
    app(documented("c2f-ray report runs/length_logistic runs/length_fixed runs/length_linear"), standalone_mode=False)
    report = Path("runs/length_logistic/report.html").read_text()
    assert all(f"length_{name}" in report for name in limits)
