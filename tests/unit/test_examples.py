"""examples/: each script is run. The jobs that they call are stand-ins here; tests/e2e runs the real ones."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import c2f_ray

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = str(EXAMPLES.parent / "configs/tiny.yaml")


@pytest.fixture
def fake_jobs(monkeypatch, tmp_path) -> list[tuple]:
    """What was called, with which recipe."""
    calls = []

    def train(recipe):
        calls.append(("train", recipe))
        folder = tmp_path / recipe.run.name
        folder.mkdir()
        last = {"reward/mean": 0.25, "length/mean": 20.0, "length/limit": recipe.length.max_tokens}
        (folder / "metrics.jsonl").write_text(json.dumps({"reward/mean": 0.0}) + "\n" + json.dumps(last) + "\n")
        return folder

    def merge(recipe):
        calls.append(("merge", recipe))
        return [tmp_path / "residue-0.2", tmp_path / "residue-0.4"]

    def evaluate(recipe):
        calls.append(("evaluate", recipe))
        models = [{"name": f"residue-{ratio}", "metrics": {"reward": ratio}} for ratio in (0.2, 0.4)]
        return {"best": "residue-0.4", "models": models}

    for job in (train, merge, evaluate):
        monkeypatch.setattr(c2f_ray, job.__name__, job, raising=False)
    return calls


def run(monkeypatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_train_merge_evaluate(monkeypatch, capsys, fake_jobs, tmp_path):
    run(monkeypatch, "train_merge_evaluate.py", RECIPE, "run.seed=7")
    assert [name for name, _ in fake_jobs] == ["train", "merge", "evaluate"]
    assert {recipe.run.seed for _, recipe in fake_jobs} == {7}
    assert capsys.readouterr().out == f"{tmp_path}/tiny: 2 fine actors; best: residue-0.4, reward 0.4\n"


def test_sweep_over_length_rules(monkeypatch, capsys, fake_jobs, tmp_path):
    run(monkeypatch, "sweep_length_rules.py", RECIPE, "run.seed=7")
    assert [(recipe.run.name, recipe.length.rule, recipe.run.seed) for _, recipe in fake_jobs] == [
        ("length_fixed", "fixed", 7), ("length_linear", "linear", 7), ("length_logistic", "logistic", 7),
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}/length_fixed: reward 0.25 at 20 tokens, limit 96"


def test_my_rewards():
    score = runpy.run_path(str(EXAMPLES / "my_rewards.py"))["score"]
    record = {"answer": "3"}
    texts = [("so 2, no, so 3", True), ("so 3.0", False), ("so 2", True), ("I do not know", True)]
    samples = [SimpleNamespace(response=text, finished=finished, record=record) for text, finished in texts]
    assert score(samples) == [1.0, 0.9, 0.0, 0.0]
