"""What others must know of an algorithm or a reward are facts on its config class, not tests on its type."""

import ast
from pathlib import Path
from typing import Any, get_args

import pytest

from c2f_ray.recipe import Learner, LearnerBase, Passes, Recipe, load_recipe
from c2f_ray.recipe.roles import named_models, needs_of, scorers, train_roles

PACKAGE = Path(__file__).parents[2] / "c2f_ray"
# The sections of which there are several kinds.
KINDS = {
    "ReMaxLearner", "PPOLearner", "RejectionSamplingLearner", "UltraRMReward", "LogRatioReward", "FunctionReward",
    "GroupBaselineLearner",
    "SumReward", "FixedLength", "LinearLength", "LogisticLength",
}  # fmt: skip
# Who may tell them apart: the validators, the registries, and what checks one kind's own settings.
ALLOWED = {
    "recipe/rules.py", "recipe/algorithms.py", "learner/rank.py", "reward/worker.py", "reward/check.py",
    "data/inputs.py", "driver/check.py", "driver/loop.py", "driver/rounds.py",
}  # fmt: skip


def kinds_tested(tree: ast.AST) -> list[int]:
    """Returns the lines that test whether something is of one of the kinds."""
    lines = []
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        names = [name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)] if called else []
        if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
            names = [node.cls.id]
        lines += [getattr(node, "lineno", 0)] if KINDS & set(names) else []
    return lines


def test_no_module_outside_the_registries_and_validators_tests_the_kind_of_a_section():
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() not in ALLOWED
        for line in kinds_tested(ast.parse(path.read_text()))
    }
    assert found == set()


def test_every_match_ends_in_assert_never():
    missing = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Match):
                last = ast.dump(node.cases[-1])
                if "assert_never" not in last:
                    missing.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert missing == []


def tiny(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, *overrides)


def test_every_algorithm_says_what_an_update_does():
    """Forward passes without gradient, passes that learn, optimizer steps: of 64 samples by hand."""
    remax, ppo = tiny("tiny").learner, tiny("tiny_ppo").learner
    assert remax.passes(64) == [Passes("policy", 1, 1, 1)]
    assert ppo.passes(64) == [Passes("policy", 2, 1, 2), Passes("critic", 1, 1, 2)]
    rounds = tiny("tiny_rejection_sampling", "learner.top_fraction=0.5", "learner.epochs=2").learner
    assert rounds.learned_samples(64, 8) == 32
    assert rounds.passes(32) == [Passes("policy", 0, 2, 4)], "two epochs of two updates of 16"
    assert tiny("tiny", "learner.kl_coefficient=0").learner.passes(64) == [Passes("policy", 0, 1, 1)]
    assert ppo.most_ranks(64) == 32
    assert remax.most_ranks(64) == 64


@pytest.mark.parametrize("learner", get_args(get_args(Learner)[0]))
def test_no_algorithm_is_without_an_answer(learner: Any):
    assert learner.passes is not LearnerBase.passes


def test_who_runs_and_what_scores_are_one_table():
    recipe = tiny("tiny_rejection_sampling", "reward.workers=3")
    assert [str(role) for role in train_roles(recipe)] == [
        "rollout: 1 x 1 CPU", "reward log_ratio_policy: 3 x 1 CPU", "reward log_ratio_reference: 3 x 1 CPU",
        "learner: 2 x 1 CPU",
    ]  # fmt: skip
    assert needs_of(train_roles(recipe)).cpus == 9
    assert [(s.title, s.key, s.sign) for s in scorers(recipe)] == [
        ("reward, policy", "reward.policy_model", 1.0), ("reward, reference", "reward.reference_model", -1.0),
    ]  # fmt: skip
    parts = (
        "{a: {weight: 1, reward: {kind: function, function: 'm:f'}}, b: {weight: 2, reward: {kind: ultrarm, model: x}}}"
    )
    summed = tiny("tiny", f"reward={{kind: sum, parts: {parts}}}")
    assert [(s.label, s.title, s.key, s.model) for s in scorers(summed)] == [
        ("a", "reward a", "reward.parts.a.reward.function", None),
        ("b", "reward b", "reward.parts.b.reward.model", "x"),
    ]
    own = tiny("tiny_ppo", "learner.critic.model=tiny:instruct")
    assert [key for key, _ in named_models(own)] == ["policy.model", "reward.model", "learner.critic.model"]
