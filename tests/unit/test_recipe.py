import subprocess
import sys
from pathlib import Path

import pytest

from c2f_ray.errors import RecipeError
from c2f_ray.recipe import Recipe, dump_recipe, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_survives_being_saved(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(dump_recipe(recipe))
    assert load_recipe(saved) == recipe


def test_remax_recipe_holds_the_model_cards_hyperparameters():
    recipe = load_recipe(CONFIGS / "mistral_7b_remax.yaml")
    card = (
        recipe.prompts.max_tokens, recipe.length.max_tokens, recipe.learner.optimizer.lr, recipe.run.epochs,
        recipe.learner.kl_penalty, recipe.learner.kl_coefficient, recipe.learner.reward_clip,
        recipe.rollout.temperature, recipe.rollout.top_p, recipe.prompts.num_prompts,
    )  # fmt: skip
    assert card == (384, 384, 5e-7, 1, "full_step", 0.1, 1.0, 0.7, 0.9, 10_000)


def test_recipes_are_checked_without_torch():
    code = (
        "import sys, c2f_ray; "
        f"c2f_ray.load_recipe({str(TINY)!r}); "
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("learner.optimizer.lrr=3", "learner.optimizer.lrr: unknown key; did you mean learner.optimizer.lr?"),
        ("lenght.rule=fixed", "lenght: unknown key; did you mean length?"),
        ("run.steps=abc", "run.steps: 'abc': input should be a valid integer"),
        ("rollout.top_p=1.5", "rollout.top_p: 1.5: input should be less than or equal to 1"),
        ("merge.ratios=[0.5, 1.5]", "merge.ratios.1: 1.5: input should be less than or equal to 1"),
        ("merge.ratios=[]", "merge: give ratios or schedules"),
        (
            "merge.scale=0.5",
            "merge: scale has no effect on methods ['residue', 'interpolate']; leave it out, or add 'task_arithmetic'",
        ),
        (
            "merge.schedules=[{name: a, ratio: 0, rules: [{layers: [3, 1], ratio: 1}]}]",
            "merge.schedules.0.rules.0: layers are first and last, counted from 0; 3 is after 1",
        ),
        (
            "merge.schedules=[{name: a, ratio: 0, rules: [{modules: lm_head.*}]}]",
            "merge.schedules.0.rules.0: give exactly one of ratio and gradient",
        ),
        (
            "learner.algorithm=remx",
            "learner.algorithm: 'remx' is not one of remax, ppo, group_baseline, rejection_sampling; "
            "did you mean remax?",
        ),
        ("evaluate.win_rate={prompts: a.jsonl}", "evaluate: win_rate: give a judge"),
        (
            "evaluate={prompts: a, judge: {kind: reward}, win_rate: {prompts: a, against: record.output}}",
            "evaluate: win_rate.against: answers beside the prompts need a judge of kind endpoint",
        ),
        (
            "evaluate.judge={kind: endpont, url: a, model: b}",
            "evaluate.judge.kind: 'endpont' is not one of endpoint, reward; did you mean endpoint?",
        ),
        (
            "evaluate.choose={by: truncated}",
            "evaluate.choose: by 'truncated': less of it is better; put it into at_most_over_instruct",
        ),
        ("run.epochs=2", "run: give exactly one of steps and epochs"),
        ("length.start_tokens=200", "length: start_tokens 200 is more than max_tokens 96"),
        (
            "learner.critic={model: policy}",
            "learner.critic: a setting of ppo only; leave it out, or change what learner is",
        ),
        (
            "learner.minibatches=4",
            "learner.minibatches: a setting of ppo only; leave it out, or change what learner is",
        ),
        (
            "learner.deepspeed={bf16: {enabled: true}}",
            "learner: deepspeed: bf16 is what policy.dtype decides; set that instead",
        ),
        (
            "learner.deepspeed={zero_optimization: {stage: 3}}",
            "learner: deepspeed: zero_optimization.stage is what learner.zero_stage decides; set that instead",
        ),
        ("learner.gamma=0.9", "learner: gamma 0.9 has no effect with kl_penalty full_step; leave it out"),
        ("run.steps", "run.steps: an override is written key=value, such as learner.optimizer.lr=5e-7"),
    ],
)
def test_an_error_names_key_value_rule_and_remedy(override: str, problem: str):
    with pytest.raises(RecipeError) as error:
        load_recipe(TINY, override)
    assert error.value.problems == (problem,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run: [", "not valid YAML"),
        ("{{ x }}: 1\n", "not valid YAML: a key is a name"),
        ("run: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        ("run: \x07\n", "not valid YAML: unacceptable character"),
        ("just words\n", "a recipe is a mapping of sections"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clear_error(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=problem):
        load_recipe(path)
    path.write_bytes(b"run: \xff\n")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_recipe(path)


@pytest.mark.parametrize("override", ["learner.optimizer.lr=.inf", "rollout.timeout_s=.inf", "length.bias=.nan"])
def test_a_number_is_finite(override: str):
    with pytest.raises(RecipeError, match="input should be a finite number"):
        load_recipe(TINY, override)


def test_offload_needs_its_stage():
    with pytest.raises(RecipeError, match="learner: offload 'all' needs zero_stage 3 or more, not 2"):
        load_recipe(TINY, "learner.offload=all")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "learner.kl_in=loss",
            "learner: kl_in loss with kl_estimator k1 has no effect: its expected gradient is zero; use k2 or k3",
        ),
        (
            "learner={algorithm: ppo, optimizer: {lr: 1.0e-3}, gpus_per_rank: 0}",
            "learner.critic: missing; it has no default",
        ),
        (
            "learner.kl_penalty=one_step",
            "learner.kl_penalty: a setting of remax only; leave it out, or change what learner is",
        ),
    ],
)
def test_ppo_settings_with_no_effect_are_refused(override: str, problem: str):
    with pytest.raises(RecipeError) as error:
        load_recipe(CONFIGS / "tiny_ppo.yaml", override)
    assert error.value.problems[0].startswith(problem.split(";")[0])


def test_ppo_settings_are_unknown_to_remax():
    with pytest.raises(RecipeError, match="learner.epochs: a setting of ppo and rejection_sampling only; leave it out"):
        load_recipe(TINY, "learner.epochs=2")


def test_a_target_for_no_kl_is_refused():
    with pytest.raises(RecipeError, match="learner: kl_target has no effect on a kl_coefficient of 0"):
        load_recipe(CONFIGS / "tiny_ppo.yaml", "learner.kl_target=6.0", "learner.kl_coefficient=0")


def test_cpu_engines_with_gpu_learners_are_refused():
    with pytest.raises(RecipeError, match=r"rollout.gpus_per_actor and learner.gpus_per_rank: .* not 0 and 1"):
        load_recipe(TINY, "learner.gpus_per_rank=1")


def test_several_problems_come_together():
    with pytest.raises(RecipeError) as error:
        load_recipe(TINY, "run.seed=-1", "policy.modell=x")
    assert [problem.split(":")[0] for problem in error.value.problems] == ["run.seed", "policy.modell"]


def test_a_small_learning_rate_needs_no_decimal_point():
    assert load_recipe(TINY, "learner.optimizer.lr=5e-7").learner.optimizer.lr == 5e-7


def test_yaml_problems_name_file_and_line(tmp_path: Path):
    path = tmp_path / "twice.yaml"
    path.write_text("run:\n  name: a\n  name: b\n")
    with pytest.raises(RecipeError, match=r"twice.yaml:3: not valid YAML: 'name' is given twice"):
        load_recipe(path)


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match=r"tinny.yaml: no such recipe; did you mean .*tiny.yaml\?"):
        load_recipe(CONFIGS / "tinny.yaml")


def test_what_was_meant_by_a_short_name_and_by_the_wrong_order(monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match="run.steps=2: the recipe comes first, then key=value"):
        load_recipe("run.steps=2", "configs/tiny.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"tinny: no such recipe; did you mean tiny\?"):
        load_recipe("tinny")
    assert load_recipe("tiny") == load_recipe(TINY), "a shipped recipe has a name, wherever one is"
    with pytest.raises(RecipeError, match=f"configs/tiny.yaml: no such recipe in {tmp_path}"):
        load_recipe("configs/tiny.yaml")


def test_a_wait_inside_another_is_not_the_longer_one():
    with pytest.raises(RecipeError) as error:
        load_recipe(TINY, "weights.timeout_s=3601")
    assert error.value.problems == (
        "recipe: weights.timeout_s: 3601 is longer than learner.timeout_s (3600), inside which a transfer runs; lower "
        "weights.timeout_s, or raise learner.timeout_s",
    )
    assert load_recipe(TINY, "weights.timeout_s=3600").weights.timeout_s == 3600
    model = "{kind: ultrarm, model: m, timeout_s: 5, max_wait_s: 5}"
    with pytest.raises(RecipeError) as error:
        load_recipe(TINY, f"reward={{kind: sum, parts: {{a: {{weight: 1, reward: {model}}}}}}}")
    assert error.value.problems == (
        "recipe: reward.parts.a.reward.max_wait_s: 5 is not shorter than reward.parts.a.reward.timeout_s (5), inside "
        "which a batch fills up; lower reward.parts.a.reward.max_wait_s",
    )


@pytest.mark.parametrize(
    ("name", "overrides", "problem"),
    [
        (
            "tiny_rejection_sampling",
            ["rollout.samples_per_prompt=1"],
            "rollout.samples_per_prompt: 1: rejection_sampling compares a prompt's samples; give 2 or more",
        ),
        (
            "tiny_rejection_sampling",
            ["evaluate=null"],
            "evaluate: missing; rejection_sampling measures each round on evaluate.prompts",
        ),
        (
            "tiny_rejection_sampling",
            ["length={rule: logistic, start_tokens: 1, max_tokens: 2, max_step_tokens: 1}"],
            "length.rule: logistic observes a critic or a baseline, and rejection_sampling has none; use fixed or "
            "linear",
        ),
        (
            "tiny",
            ["policy.dtype=bfloat16", "learner.zero_stage=0"],
            "learner.zero_stage: 0 with policy.dtype bfloat16 is not offered: DeepSpeed's optimizer for it counts one "
            "step too many; use 1, which on one rank is the same",
        ),
        (
            "tiny_ppo",
            ["learner.critic.model=reward", "reward={kind: function, function: 'm:f'}"],
            "learner.critic.model: 'reward' needs a reward model to start from, and reward.kind is 'function'; use "
            "'policy' or a folder",
        ),
        (
            "mistral_c2f",
            ["rollout.memory=20"],
            "rollout.memory: on a GPU it is a share of its memory, at most 1; not 20",
        ),
    ],
)
def test_sections_that_disagree_are_refused(name: str, overrides: list[str], problem: str):
    with pytest.raises(RecipeError) as error:
        load_recipe(CONFIGS / f"{name}.yaml", *overrides)
    assert error.value.problems[0].removeprefix("recipe: ").removesuffix(".0") == problem


def test_recipes_are_frozen():
    recipe: Recipe = load_recipe(TINY)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.seed = 3  # type: ignore[misc]


def test_sampling_ahead_needs_the_correction_for_it():
    ahead = "rollout.max_staleness=1"
    with pytest.raises(RecipeError, match=r"max_staleness: 1 makes samples off-policy; set learner.importance_clip"):
        load_recipe(CONFIGS / "tiny.yaml", ahead)
    assert load_recipe(CONFIGS / "tiny.yaml", ahead, "learner.importance_clip=2.0").rollout.max_staleness == 1
    ahead = [ahead, "learner.importance_clip=2.0"]
    with pytest.raises(RecipeError, match=r"wait_for: 0.9 leaves samples to the next step, .*max_staleness to 2"):
        load_recipe(CONFIGS / "tiny.yaml", *ahead, "rollout.wait_for=0.9")
    with pytest.raises(RecipeError, match=r"in_flight: continue without rollout.max_staleness has no meaning"):
        load_recipe(CONFIGS / "tiny.yaml", "rollout.in_flight=continue")
    with pytest.raises(RecipeError, match=r"run.deterministic: true with rollout.in_flight: continue .* on time"):
        load_recipe(CONFIGS / "tiny.yaml", *ahead, "rollout.in_flight=continue", "run.deterministic=true")
    with pytest.raises(RecipeError, match="1 with rejection_sampling has no meaning"):
        load_recipe(CONFIGS / "tiny_rejection_sampling.yaml", ahead[0])
