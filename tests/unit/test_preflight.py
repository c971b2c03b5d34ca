"""What `train` refuses before any actor starts. The models are layouts only: their weights are never read."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from c2f_ray.driver.check import check_train
from c2f_ray.driver.checkpoints import RunState, write_checkpoint
from c2f_ray.driver.length import LengthState
from c2f_ray.errors import RecipeError
from c2f_ray.recipe import dump_recipe, load_recipe
from c2f_ray.recipe.roles import Needs
from c2f_ray.runtime.session import check_resources
from c2f_ray.tiny.tokenizer import policy_tokenizer, reward_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a world of its own and, beside it, the recipes of the tiny world for that world."""
    world = tmp_path / "world"
    for name in ("tiny.yaml", "tiny_ppo.yaml"):
        (tmp_path / name).write_text((CONFIGS / name).read_text().replace("tiny:", "world/"))
    for name, tokenizer in (
        ("base", policy_tokenizer(with_template=False)),
        ("instruct", policy_tokenizer(with_template=True)),
        ("reward", reward_tokenizer()),
    ):
        tokenizer.save_pretrained(world / name)
        config = {"model_type": "llama" if name == "reward" else "mistral", "max_position_embeddings": 256}
        (world / name / "config.json").write_text(json.dumps(config))
        tensor = "regression_head.weight" if name == "reward" else "lm_head.weight"
        save_file({tensor: np.zeros((1, 4), np.float32)}, world / name / "model.safetensors")
    (world / "prompts").mkdir()
    (world / "prompts" / "train.jsonl").write_text('{"messages": "b=3,b?"}\n' * 1)
    monkeypatch.chdir(tmp_path)
    return world


def problems(*overrides: str, fresh: bool = False) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as error:
        check_train(load_recipe("tiny.yaml", *overrides), fresh)
    return error.value.problems


def test_a_good_recipe_passes(folder: Path):
    checked = check_train(load_recipe("tiny.yaml"), fresh=False)
    assert (len(checked.prompts), checked.total_steps) == (1, load_recipe("tiny.yaml").run.steps)


def test_epochs_become_steps(folder: Path):
    lines = "".join(json.dumps({"id": str(i), "messages": "b=3,b?"}) + "\n" for i in range(100))
    (folder / "prompts" / "train.jsonl").write_text(lines)
    checked = check_train(load_recipe("tiny.yaml", "run.steps=null", "run.epochs=3"), fresh=False)
    assert checked.total_steps == 5, "300 prompts, 64 a step"


def test_a_missing_model_folder(folder: Path):
    shutil.rmtree(folder / "base")
    assert problems() == ("policy.model: world/base: no such folder",)


def test_pickled_weights_only(folder: Path):
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")
    assert problems() == (
        "policy.model: world/base: holds only .bin files, which are pickles; "
        "convert or save the weights as safetensors",
    )


def test_no_tokenizer(folder: Path):
    (folder / "reward" / "tokenizer.json").unlink()
    (problem,) = problems()
    assert problem.startswith("reward.model: world/reward: no tokenizer")


def test_a_reward_model_without_a_head(folder: Path):
    save_file({"lm_head.weight": np.zeros((1, 4), np.float32)}, folder / "reward" / "model.safetensors")
    (problem,) = problems()
    assert problem.startswith("reward.model: world/reward has no regression_head.weight")


def test_several_problems_come_together(folder: Path):
    (folder / "prompts" / "train.jsonl").write_text("{\n")
    found = problems("reward.model=nowhere", "length.max_tokens=250")
    assert [problem.split(": ")[0] for problem in found] == [
        "reward.model",
        "world/prompts/train.jsonl:1",
        "prompts.max_tokens 48 and length.max_tokens 250 together are 298 tokens, beyond the model's context of 256; "
        "lower one of them",
    ]


def test_a_base_model_needs_a_template(folder: Path):
    (problem,) = problems("policy.chat_template=model")
    assert problem.startswith("policy.chat_template: the tokenizer of world/base has no chat template")


@pytest.fixture
def begun(folder: Path) -> Path:
    """The folder of configs/tiny.yaml's run, with a checkpoint after step 3."""
    recipe = load_recipe("tiny.yaml")
    run = Path("runs/tiny")
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    architecture = check_train(recipe, fresh=True).policy_config
    write_checkpoint(run, RunState(3, 192, 3, LengthState(20.5)), architecture, lambda folder: {})
    return run


def test_a_run_goes_on_from_its_checkpoint(begun: Path):
    checked = check_train(load_recipe("tiny.yaml", "learner.optimizer.lr=1e-4", "learner.ranks=1"), fresh=False)
    assert checked.resume is not None
    assert (checked.resume.state.step, checked.resume.state.position) == (3, 192)
    anew = "(--fresh, or another run.name, starts anew)"
    assert checked.notes == [
        f"changed since the run was last started: learner.ranks: 2 before, 1 now {anew}",
        f"changed since the run was last started: learner.optimizer.lr: 0.0005 before, 0.0001 now {anew}",
        "continues from runs/tiny/checkpoints/step_000003",
    ]
    fresh = check_train(load_recipe("tiny.yaml"), fresh=True)
    assert (fresh.resume, fresh.notes) == (None, [])


def test_a_run_without_a_checkpoint_starts_from_its_first_step(begun: Path):
    folder = begun / "checkpoints" / "step_000003"
    folder.rename(folder.with_name("step_000003.partial"))
    checked = check_train(load_recipe("tiny.yaml"), fresh=False)
    assert checked.resume is None
    assert checked.notes == [
        "runs/tiny/checkpoints/step_000003.partial: was not finished",
        "runs/tiny has no checkpoint yet: the run starts from its first step",
    ]
    (begun / "coarse").mkdir()
    assert "holds a finished run without checkpoints; choose another run.name, or start over" in problems()[0]


def test_what_a_run_cannot_change(begun: Path, folder: Path):
    assert problems("prompts.per_step=32", "run.seed=2") == (
        "run.seed: 1 before, 2 now: the run at runs/tiny cannot change it any more; "
        "choose another run.name, or start over with --fresh",
        "prompts.per_step: 64 before, 32 now: the run at runs/tiny cannot change it any more; "
        "choose another run.name, or start over with --fresh",
    )
    config = json.loads((folder / "base" / "config.json").read_text()) | {"hidden_size": 128}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    *_, problem = problems()  # after another field that transformers derives from it
    assert problem.startswith("policy.model: hidden_size is 128, and 4096 in the model that runs/tiny/checkpoints/step")


def test_a_run_whose_checkpoints_are_all_broken_is_not_started_over(begun: Path):
    (begun / "checkpoints" / "step_000003" / "state.json").write_text("{}")
    assert problems() == (
        "run.name: runs/tiny/checkpoints/step_000003: state.json does not match its checksum",
        "run.name: runs/tiny has no checkpoint that can be used; choose another run.name, or start over with --fresh",
    )


def test_fresh_removes_nothing_but_a_run(folder: Path):
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/thesis.tex").write_text("years of work")
    assert "is not a run's folder, so --fresh does not remove it" in problems(fresh=True)[0]
    with pytest.raises(RecipeError, match=r"run.name: '..': string should match pattern"):
        load_recipe("tiny.yaml", "run.name=..")
    Path("file").write_text("")
    assert problems("run.folder=file") == ("run.folder: file is a file; choose another folder",)


def test_the_reward_models_context(folder: Path):
    assert problems("reward.max_tokens=300") == (
        "reward.max_tokens: 300 is beyond the context of world/reward, which has room for 256; lower it",
    )


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["learner.minibatches=5"], "learner.minibatches: 5: a step has 64 samples, * which it does not divide evenly"),
        (["learner.minibatches=128"], "learner.minibatches: 128: a step has 64 samples, * does not divide evenly"),
        (
            ["learner.minibatches=64"],
            "learner.minibatches: 64: a step has 64 samples, * so a minibatch has 1 for 2 ranks",
        ),
        (["learner.critic.warmup_steps=36"], "learner.critic.warmup_steps: 36 of the run's 36 steps leave none"),
        (["learner.critic.model=nowhere"], "learner.critic.model: nowhere: no such folder"),
        (
            ["learner.critic.model=reward"],
            "learner.critic.model: world/reward has another vocabulary than world/base, so the policy's "
            "token ids would be other words to it; use 'policy'",
        ),
    ],
)
def test_ppo_settings_that_cannot_work(folder: Path, overrides: list[str], problem: str):
    with pytest.raises(RecipeError) as error:
        check_train(load_recipe("tiny_ppo.yaml", *overrides), fresh=False)
    (found,) = error.value.problems
    assert fnmatch(found, f"{problem}*")


def test_a_critic_with_the_policys_vocabulary_passes(folder: Path):
    """Samples per prompt count as samples of the step; the critic may be any model that reads the policy's ids."""
    overrides = ["learner.critic.model=world/instruct", "rollout.samples_per_prompt=2", "learner.minibatches=64"]
    assert check_train(load_recipe("tiny_ppo.yaml", *overrides), fresh=False).total_steps == 36
    config = json.loads((folder / "instruct" / "config.json").read_text()) | {"max_position_embeddings": 100}
    (folder / "instruct" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="beyond the critic's context of 100"):
        check_train(load_recipe("tiny_ppo.yaml", *overrides), fresh=False)


def test_a_policy_that_cannot_be_packed(folder: Path):
    config = json.loads((folder / "base" / "config.json").read_text()) | {"attn_logit_softcapping": 30.0}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert problems("learner.packing=true") == (
        "policy.model: it has attn_logit_softcapping, which cannot be packed; set learner.packing to false",
    )


def test_lora_targets_that_are_no_linear_layers(folder: Path):
    layers = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    where = "no such linear layer in world/base; choose from "
    targets = "learner.lora={rank: 4, alpha: 8, targets: [q_proj, lm_head, mlp, roj, layers.1.mlp.up_proj]}"
    assert problems(targets) == (f"learner.lora.targets: mlp, roj: {where}{layers}",)
    config = json.loads((folder / "base" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert problems(targets) == (f"learner.lora.targets: lm_head, mlp, roj: {where}{layers.replace(' lm_head,', '')}",)


def test_a_pair_must_share_tokens_and_have_a_template_and_room(folder: Path):
    """Also inside a sum, where the problems of all parts come together."""
    pair = "kind: log_ratio, gpus_per_worker: 0, policy_model: world/POLICY, reference_model: world/reward"
    own = "reward={" + pair.replace("POLICY", "reward") + ", max_tokens: MOST}"
    check_train(load_recipe("tiny.yaml", own.replace("MOST", "255")), fresh=False)
    assert problems(own.replace("MOST", "256")) == (
        "reward.max_tokens: 256 is beyond the context of world/reward, which has room for 255; lower it",
    )
    parts = (
        f"a: {{weight: 1, reward: {{{pair.replace('POLICY', 'instruct')}, max_tokens: 200}}}}, "
        "b: {weight: 1, reward: {kind: function, function: 'nowhere:score'}}"
    )
    assert problems(f"reward={{kind: sum, parts: {{{parts}}}}}") == (
        "reward.parts.a.reward.reference_model: world/reward has another vocabulary than world/instruct; a "
        "log ratio compares the probabilities of the same tokens",
        "reward.parts.b.reward.function: nowhere:score: No module named 'nowhere'",
    )
    template = own.replace("MOST", "200").replace(", max", ", chat_template: nowhere.jinja, max")
    assert problems(template) == (
        "reward.chat_template: nowhere.jinja: no such file; give `model`, `plain`, or a .jinja file",
    )
    Path("silent.jinja").write_text("{{ messages[0]['content'] }}")
    assert problems(template.replace("nowhere", "silent")) == (
        "reward.chat_template: it cannot render an assistant's message: the chat template does not render the response "
        "'answer' as it is",
    )


def test_a_reward_function_is_found_in_the_working_directory(folder: Path):
    Path("a_reward_of_ours.py").write_text("def score(samples):\n    return [0.0 for _ in samples]\nseven = 7\n")
    check_train(load_recipe("tiny.yaml", "reward={kind: function, function: 'a_reward_of_ours:score'}"), False)
    assert problems("reward={kind: function, function: 'a_reward_of_ours:rate'}") == (
        "reward.function: a_reward_of_ours:rate: module 'a_reward_of_ours' has no attribute 'rate'",
    )
    assert problems("reward={kind: function, function: 'a_reward_of_ours:seven'}") == (
        "reward.function: a_reward_of_ours:seven: seven is no function, but int",
    )
    assert problems("reward={kind: function, function: 'nowhere:rate'}") == (
        "reward.function: nowhere:rate: No module named 'nowhere'",
    )


def test_more_gpus_than_the_machine_has():
    check_resources(Needs(gpus=8, cpus=0), {"GPU": 8.0})
    with pytest.raises(RecipeError, match="the recipe asks for 8 GPU, and this machine has 4; lower rollout.actors"):
        check_resources(Needs(gpus=8, cpus=0), {"GPU": 4.0, "CPU": 64.0})
