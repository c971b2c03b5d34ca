"""Where a run's metrics go beside its folder: Ray's gauges, which Grafana draws, and Weights & Biases."""

import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from c2f_ray.driver.check import check_wandb
from c2f_ray.errors import RecipeError
from c2f_ray.recipe import dump_recipe, load_recipe
from c2f_ray.watch.metrics import MetricsLog

ROOT = Path(__file__).parents[2]
LINE = {
    "step": 3, "reward/mean": 0.5, "time/rollout_s": 4.0, "time/learner_forward_backward_s": 2.0, "time/step_s": 9.0,
    "time/samples_per_s": 12.8, "time/scores_ready": 0.75,
}  # fmt: skip


class FakeGauge:
    values: dict[tuple, float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        FakeGauge.values[self.name, *tags.values()] = value


@pytest.fixture
def gauges(monkeypatch) -> dict[tuple, float]:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.metrics.Gauge", FakeGauge)
    FakeGauge.values = {}
    return FakeGauge.values


def test_every_metric_is_a_gauge_by_phase_and_seconds_are_by_role(tmp_path, gauges):
    folder = tmp_path / "cats"
    folder.mkdir()
    log = MetricsLog(folder)
    log.write(LINE)
    log.close()
    assert gauges == {
        ("c2f_metric", "cats", "step", ""): 3,
        ("c2f_metric", "cats", "reward", "mean"): 0.5,
        ("c2f_metric", "cats", "time", "samples_per_s"): 12.8,
        ("c2f_metric", "cats", "time", "scores_ready"): 0.75,
        ("c2f_seconds", "cats", "rollout", "all"): 4.0,
        ("c2f_seconds", "cats", "learner", "forward_backward"): 2.0,
        ("c2f_seconds", "cats", "step", "all"): 9.0,
    }


def test_the_dashboard_asks_for_metrics_that_are_written():
    dashboard = json.loads((ROOT / "cluster" / "grafana" / "c2f_ray.json").read_text())
    source = "".join(path.read_text() for path in (ROOT / "c2f_ray").rglob("*.py"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = [re.search(r'phase="(\w+)", name="(\w+)"', expression) for expression in expressions]
    for phase, name in [match.groups() for match in asked if match]:
        assert f'"{phase}/{name}"' in source, f"{phase}/{name}"
        assert phase != "time" or not name.endswith("_s") or name.endswith("_per_s"), f"{name} is in c2f_seconds"
    ours = [expression for expression in expressions if expression.startswith("ray_c2f_")]
    assert {expression.split("{")[0] for expression in ours} == {"ray_c2f_metric", "ray_c2f_seconds"}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == 14


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.inits, self.lines, self.ends = [], [], 0

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, line: dict) -> None:
        self.lines.append(line)

    def finish(self) -> None:
        self.ends += 1


def test_wandb_gets_every_line_and_a_run_that_goes_on_is_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(ROOT / "configs" / "tiny.yaml")))
    log = MetricsLog(tmp_path, wandb="cats")
    log.write(LINE)
    log.go_back(2)  # a learner that starts again is no new run
    log.write(LINE | {"reward/mean": float("nan")})
    log.close()
    MetricsLog(tmp_path, 3, wandb="cats").close()
    assert [line["reward/mean"] for line in fake.lines] == [0.5, None]
    first, second = fake.inits
    assert first == second
    assert (first["project"], first["resume"], first["config"]["run"]["seed"]) == ("cats", "allow", 1)
    assert fake.ends == 2


def test_wandb_is_left_alone_where_no_recipe_asks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would fail
    MetricsLog(tmp_path).close()
    check_wandb(None)


def test_wandb_needs_its_package_and_its_key(monkeypatch):
    monkeypatch.setattr("c2f_ray.driver.check.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="run.wandb: 'cats' needs the package wandb"):
        check_wandb("cats")
    monkeypatch.setattr("c2f_ray.driver.check.find_spec", lambda name: ModuleSpec(name, None))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RecipeError, match="run.wandb: 'cats' needs the environment variable WANDB_API_KEY"):
        check_wandb("cats")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb("cats")


def test_the_wandb_key_is_written_nowhere(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "planted-4711")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(ROOT / "configs" / "tiny.yaml", "run.wandb=cats")))
    log = MetricsLog(tmp_path, wandb="cats")
    log.write(LINE)
    log.close()
    assert "planted-4711" not in str(fake.inits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"planted-4711" in path.read_bytes()]
