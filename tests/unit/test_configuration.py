"""The fields of a recipe explain themselves: on the command line, in docs/configuration.md, and to editors."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from typer.testing import CliRunner

import c2f_ray.recipe
from c2f_ray.cli import app
from c2f_ray.errors import RecipeError
from c2f_ray.recipe import document
from c2f_ray.recipe.load import parse_yaml
from tests.documented import documented

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SECTIONS = [
    value for value in vars(c2f_ray.recipe).values() if isinstance(value, type) and issubclass(value, BaseModel)
]


@pytest.mark.parametrize("path", [document.PAGE, document.SCHEMA], ids=str)
def test_generated_files_are_those_that_make_docs_writes(path: Path, tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").mkdir()
    document.write(tmp_path)
    assert (ROOT / path).read_text() == (tmp_path / path).read_text()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_and_every_field_is_explained(section: type[BaseModel]):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description and field.description.endswith("."), f"{section.__name__}.{name}"


def test_the_schema_accepts_the_shipped_recipes_and_refuses_faults():
    schema = json.loads((ROOT / document.SCHEMA).read_text())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for path in CONFIGS:
        recipe = parse_yaml(path.read_text(), where=path.name)
        assert list(validator.iter_errors(recipe)) == [], path.name
        for section, change in (("learner", {"lrr": 1}), ("rollout", {"top_p": 1.5}), ("length", {"rule": "other"})):
            assert not validator.is_valid(recipe | {section: recipe[section] | change})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_find_the_schema(path: Path):
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert yaml.safe_load(path.read_text())["run"]


def test_explain_prints_type_default_and_meaning():
    ran = CliRunner().invoke(app, documented("c2f-ray explain learner.optimizer.lr"))
    assert (ran.exit_code, ran.output.splitlines()) == (
        0,
        ["learner.optimizer.lr", "  Highest learning rate.", "  type: number > 0", "  default: required"],
    )


def test_explain_names_the_variants_that_have_a_field():
    assert document.explain("learner.minibatches").splitlines()[1:] == [
        "  Optimizer steps in one pass. They divide the samples of a step evenly.",
        "  type: integer >= 1",
        "  default: `4`",
        "  only of: ppo",
    ]
    found = document.explain("learner.kl_coefficient")
    assert "default: `0.05`\n  only of: ppo" in found
    assert "default: `0.1`\n  only of: group_baseline, remax" in found
    assert "`PACK`, `SPREAD`" in document.explain("cluster.placement")


def test_explain_lists_the_fields_of_a_section():
    ran = CliRunner().invoke(app, documented("c2f-ray explain learner"))
    lines = ran.output.splitlines()
    assert "  learner.zero_stage: `0`, `1`, `2`, `3`, `2`" in lines
    assert "  learner.critic.optimizer.lr: [ppo] number > 0, required" in lines
    assert [line.split()[0] for line in document.explain("").splitlines()] == [
        "run", "cluster", "policy", "prompts", "length", "rollout", "reward", "learner", "weights", "checkpoints",
        "merge", "evaluate",
    ]  # fmt: skip


def test_explain_knows_positions_and_names():
    assert "number >= 0, <= 1" in document.explain("merge.schedules.0.rules.12.ratio")
    assert "Factor of this reward" in document.explain("reward.parts.helpful.weight")
    assert document.explain("reward.parts.helpful.reward.workers") == document.explain("reward.workers")


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("learner.optimiser.lr", "learner.optimiser.lr: unknown key; did you mean learner.optimizer.lr?"),
        ("qqqq", "qqqq: unknown key; `c2f-ray explain` lists the sections"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, problem: str):
    with pytest.raises(RecipeError) as error:
        document.explain(key)
    assert error.value.problems == (problem,)
