"""`c2f-ray plan`: formulas against what was measured and what others compute, and the command itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from c2f_ray.cli import app
from c2f_ray.errors import RecipeError
from c2f_ray.learner import logprobs
from c2f_ray.plan import memory
from c2f_ray.plan.clusters import GPUS, Actor, Node, actors_of, chosen_nodes, place
from c2f_ray.plan.estimate import disk, estimate, read_models
from c2f_ray.plan.memory import GIB, engine_memory, learner_memory
from c2f_ray.plan.model import MISTRAL_7B, PUBLISHED, ModelShape, read_model
from c2f_ray.plan.schedule import step
from c2f_ray.recipe import Recipe, load_recipe
from c2f_ray.recipe.roles import needs_of, scorers, train_roles
from tests.documented import documented

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ON_GPUS = [path for path in CONFIGS if not path.stem.startswith("tiny")]
A100 = GPUS["A100-80G"]
NETWORK = 12.5e9


def seed(name: str, *overrides: str):
    return load_recipe(ROOT / "configs" / f"{name}.yaml", *overrides)


def planned(recipe, gpus: int | None = None, memory_gib: float | None = None):
    return estimate(recipe, chosen_nodes(recipe, None, gpus, 8, None, memory_gib), NETWORK)


def test_published_sizes():
    """The parameter counts that the models' cards and indexes give."""
    assert PUBLISHED["mistralai/Mistral-7B-v0.1"].parameters == 7_241_732_096
    assert PUBLISHED["mistralai/Mixtral-8x7B-v0.1"].parameters == 46_702_792_704
    assert PUBLISHED["openbmb/UltraRM-13b"].parameters == 13_015_864_320  # with Llama-2-13b's output layer
    assert MISTRAL_7B.kv_elements * 2 == 131_072  # 128 KiB a token in bfloat16


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "qwen2", "qwen3"])
def test_parameters_as_transformers_has_them(kind, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=1000, hidden_size=96, intermediate_size=200, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=kind == "qwen2",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert read_model("policy.model", str(tmp_path)).parameters == sum(p.numel() for p in model.parameters())


def test_a_model_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"policy.model: .*/none: no config.json"):
        read_model("policy.model", str(tmp_path / "none"))
    with pytest.raises(RecipeError) as error:
        read_models(seed("mistral_c2f", "policy.model=other/policy", "reward.model=none"))
    assert error.value.problems == (
        "policy.model: other/policy: no config.json there; fetch it: hf download other/policy config.json",
        "reward.model: none: no config.json there; give a model's folder (make demo makes the demo's)",
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(RecipeError, match=r"does not know models of type 'gpt2'; it knows llama"):
        read_model("policy.model", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(RecipeError, match=r"not a model's configuration"):
        read_model("policy.model", str(tmp_path))


MEASURED = json.loads((ROOT / "benchmarks/results/memory.json").read_text())


@pytest.mark.parametrize("name", MEASURED["cases"])
def test_memory_as_measured_on_real_ranks(name):
    """By benchmarks/memory.py: every allocation of a DeepSpeed rank in an update of 36 million parameters."""
    case, shape = MEASURED["cases"][name], ModelShape(**MEASURED["shape"])
    recipe = Recipe.model_validate(
        {
            "run": {"name": "measured", "steps": 2},
            "policy": {"model": "none", "dtype": case["dtype"]},
            "prompts": {"source": "none", "max_tokens": MEASURED["prompt_tokens"]},
            "length": {"rule": "fixed", "max_tokens": MEASURED["response_tokens"]},
            "rollout": {"gpus_per_actor": 0},
            "reward": {"kind": "function", "function": "none:none"},
            "learner": case["learner"],
        }
    )
    found = learner_memory(recipe, shape, shape if case["learner"]["algorithm"] == "ppo" else None)
    total = found.total + sum(found.host.values())
    assert total == pytest.approx(case["peak"], rel=0.1)


def model_states(found: memory.Memory) -> float:
    return sum(found.gpu[part] for part in ("weights", "gradients", "optimizer"))


def test_model_states_as_deepspeed_estimates_them():
    """Under ZeRO-2 it counts bfloat16 gradients of a rank's share beside their float32 sum; ours lie in the bucket."""
    script = """
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three
P = 7_241_732_096
print(two(P, 4, 1, cpu_offload=False)[1], three(P, 0, 4, 1, cpu_offload=False, cpu_offload_params=False)[1])
"""
    env = {"DS_ACCELERATOR": "cpu", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    zero2, zero3 = map(int, ran.stdout.split()[-2:])
    parameters = MISTRAL_7B.parameters
    for stage, theirs in ((2, zero2 - 2 * parameters / 4), (3, zero3)):
        recipe = seed("merlinite_7b_pt", f"learner.zero_stage={stage}")
        assert model_states(learner_memory(recipe, MISTRAL_7B, None)) == pytest.approx(theirs, rel=1e-6)


def test_logits_chunk_is_the_learners():
    assert memory.CHUNK_TOKENS == logprobs.CHUNK_TOKENS


def test_memory_by_hand():
    """Mistral-C2F's learner: ZeRO-3 over 4 ranks, optimizer offloaded, 16,384 tokens with checkpointing."""
    found = learner_memory(seed("mistral_c2f"), MISTRAL_7B, MISTRAL_7B)
    policy, critic = 7_241_732_096, 7_241_732_096 - 32000 * 4096
    assert found.gpu["weights"] == 2 * (policy + critic) / 4
    assert found.gpu["reference"] == 2 * policy / 4
    assert found.host["optimizer"] == 12 * (policy + critic) / 4
    layer = 16384 * (2 * 8 * 4096 + 2 * (2 * 4096 + 2 * 1024 + 4 * 14336))
    assert found.gpu["activations"] == 16384 * 32 * 2 * 4096 + 1.5 * layer


def test_adapters_learn_instead_of_the_weights():
    lora = "learner.lora={rank: 64, alpha: 128, targets: [q_proj, down_proj]}"
    recipe = seed("mistral_7b_remax", lora, "learner.offload=none")
    found = learner_memory(recipe, MISTRAL_7B, None)
    adapters = 64 * 32 * ((4096 + 4096) + (14336 + 4096))
    assert found.gpu["optimizer"] == 12 * adapters / 2
    assert "reference" not in found.gpu
    assert disk(recipe, read_models(recipe))["checkpoints, 2 kept and 1 on its way"] == 3 * 12 * adapters


def test_cache_holds_what_vllm_leaves_it():
    """Of 79.2 GiB 90%, less weights, 16,384 tokens' activations and the allowance: 54.0 GiB of 128 KiB a token."""
    engine = engine_memory(seed("mistral_7b_remax"), MISTRAL_7B, A100.memory, 384)
    activations = 16384 * 2 * (4 * 4096 + 3 * 14336)
    left = 0.9 * 79.2 * GIB - 2 * 7_241_732_096 - activations - 2 * GIB
    assert engine.kv_tokens == pytest.approx(left / 131072)
    assert engine.in_flight == 256
    assert engine_memory(seed("mistral_c2f"), MISTRAL_7B, A100.memory, 3072).in_flight == int(left / 131072 // 3584)


def test_seconds_by_hand():
    """ReMax: 64 rollouts on each of 4 engines in one wave, decoding bound by the memory's bandwidth."""
    recipe = seed("mistral_7b_remax")
    models = read_models(recipe)
    engine = engine_memory(recipe, MISTRAL_7B, A100.memory, 384)
    found = step(recipe, models, A100, engine, 384, NETWORK, 8)
    read = 2 * 7_241_732_096 + 64 * 576 * 131072  # keys and values of half the response on average
    active = 7_241_732_096 - 2 * 32000 * 4096 - 65 * 4096
    prefill = 64 * 384 * (2 * active + 2 * 32 * 4096 * 384) / (0.5 * 312e12)
    assert found.rollout == pytest.approx(384 * read / (0.6 * 2.039e12) + prefill)
    assert found.weights == pytest.approx(2 * 7_241_732_096 / 12.5e9)
    assert found.seconds == pytest.approx(max(found.rollout, found.reward) + found.learner + found.weights)


def test_seconds_where_the_next_step_is_sampled_beside_the_learner():
    pipelined = planned(seed("mistral_7b_remax", "rollout.max_staleness=1", "learner.importance_clip=2.0")).steps[384]
    assert pipelined.learner > pipelined.reward > pipelined.rollout
    assert pipelined.seconds == pytest.approx(pipelined.learner + pipelined.weights)


def test_a_longer_limit_costs_more():
    found = planned(seed("mistral_c2f"))
    start, longest = found.steps[384], found.steps[3072]
    assert longest.learner / start.learner > (512 + 3072) / (512 + 384) / 2
    assert longest.seconds > start.seconds
    assert found.total_steps == -(-50000 // 256)


def test_the_best_split_is_quicker_and_uses_as_many_gpus():
    for path in ON_GPUS:
        recipe = load_recipe(path)
        found = planned(recipe)
        assert found.split is not None
        counts, seconds = found.split
        again = planned(load_recipe(path, *(f"{key}={count}" for key, count in counts.items())))
        longest = max(again.steps)
        assert again.steps[longest].seconds == pytest.approx(seconds)
        assert seconds <= found.steps[longest].seconds
        assert sum(a.gpus for a in actors_of(again.recipe)) <= sum(a.gpus for a in actors_of(recipe))
        assert not again.problems


def test_what_does_not_fit_is_told_with_a_change_that_does():
    recipe = seed("mistral_7b_remax", "learner.offload=none", "learner.gradient_checkpointing=false")
    found = planned(recipe)
    (problem,) = found.problems
    assert problem.startswith("learner: needs ")
    changes = problem.partition("; with ")[2].partition(" it needs")[0].split()
    assert "learner.gradient_checkpointing=true" in changes
    assert not planned(load_recipe(ROOT / "configs/mistral_7b_remax.yaml", "learner.offload=none", *changes)).problems
    small = planned(seed("mistral_7b_remax"), memory_gib=16)
    assert [problem.split(":")[0] for problem in small.problems] == ["rollout", "reward", "learner"]
    assert "rollout.gpus_per_actor=2" in small.problems[0]
    assert "take larger GPUs" in small.problems[1]
    tight = planned(seed("mistral_7b_remax"), memory_gib=10).problems[0]
    assert "with rollout.gpus_per_actor=4 it needs" in tight  # and not 2 and 4


def test_too_few_gpus_are_told():
    found = planned(seed("mistral_c2f"), gpus=12)
    (problem,) = found.problems
    assert found.split is not None
    assert sum(found.split[0].values()) <= 12
    assert "4 actors (learner) find no room: 4 GPUs more are needed, and the cluster has 12 GPUs" in problem


def test_large_actors_are_placed_first():
    nodes = [Node("node", 8, 0), Node("learner", 4, 0)]
    actors = [Actor("rollout", 1, 0)] * 5 + [Actor("reward", 4, 0)] + [Actor("learner", 1, 0)] * 3
    placed, left = place(actors, nodes)
    assert [[actor.role for actor in node] for node in placed] == [
        ["reward", "rollout", "rollout", "rollout", "rollout"],
        ["rollout", "learner", "learner", "learner"],
    ]
    assert left == []
    assert place([Actor("reward", 16, 0)], nodes)[1] == [Actor("reward", 16, 0)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_actors_are_those_that_train_reserves(path):
    recipe = load_recipe(path)
    actors, needs = actors_of(recipe), needs_of(train_roles(recipe))
    assert (sum(a.gpus for a in actors), sum(a.cpus for a in actors)) == (needs.gpus, needs.cpus)


def tiny_models(path: Path, folder: Path) -> list[str]:
    """Overrides that give a recipe of the demo's world models that are there, as far as a plan reads them."""
    shape = {
        "model_type": "mistral", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    keys = ["policy.model", *(scorer.key for scorer in scorers(load_recipe(path)) if scorer.model)]
    return [f"{key}={folder}" for key in keys]


def test_every_recipe_is_planned_in_two_seconds_without_torch(tmp_path):
    """Of CPU time, each in the same process, and the first with all imports."""
    commands = [[str(path), *(tiny_models(path, tmp_path) if path not in ON_GPUS else [])] for path in CONFIGS]
    script = f"""
import sys, time
from c2f_ray.cli import app
seconds = [0.0]
for command in {commands!r}:
    app(["plan", *command], standalone_mode=False)
    seconds.append(time.process_time())
assert not {{"torch", "ray", "transformers", "vllm", "deepspeed"}} & set(sys.modules), sorted(sys.modules)
print("slowest:", max(b - a for a, b in zip(seconds, seconds[1:])))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.split("slowest:")[1]) < 2


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})


def test_the_command_says_what_does_not_fit():
    recipe = str(ROOT / "configs/mistral_7b_remax.yaml")
    fits, not_fits = run(recipe, "--gpu", "H100"), run(recipe, "--gpus", "4")
    assert fits.exit_code == 0
    assert "H100, 79.6 GiB" in fits.output
    assert not_fits.exit_code == 1
    assert "does not fit: placement: " in not_fits.output
    with pytest.raises(RecipeError, match="'T4' is not one of A100-40G"):
        chosen_nodes(load_recipe(recipe), None, None, 8, "T4", None)


def test_on_cpus_memory_is_told_and_no_seconds(tmp_path):
    models = tiny_models(ROOT / "configs/tiny.yaml", tmp_path)
    assert "seconds are estimated for GPUs alone" in run(str(ROOT / "configs/tiny.yaml"), *models).output
    found = planned(seed("tiny", *models))
    assert found.steps == {}
    shape = ModelShape(3, 128, 384, 4, 2, 32, 256)
    learner = found.roles[2].memory.gpu
    assert learner["weights"] == 4 * shape.parameters
    assert learner["optimizer"] == 12 * shape.parameters / 2
    assert found.engines[96].in_flight == min(256, int(0.25 * GIB / (4 * shape.kv_elements) // (48 + 96)))


def test_a_log_ratio_has_engines_for_both_models():
    """Merlinite: 46.7 B parameters in bfloat16 over two GPUs each."""
    found = planned(seed("merlinite_7b_pt"))
    assert [role.name for role in found.roles] == ["rollout", "reward, policy", "reward, reference", "learner"]
    assert [role.gpus for role in found.roles] == [1, 2, 2, 1]
    assert found.roles[1].memory.gpu["weights"] == 46_702_792_704
    assert found.roles[1].room == 0.9 * A100.memory


def test_parts_of_a_sum_have_workers_of_their_own():
    parts = "{rm: {weight: 1, reward: {kind: ultrarm, model: openbmb/UltraRM-13b, workers: 2}}, "
    parts += "right: {weight: 0.5, reward: {kind: function, function: 'm:f', workers: 3}}}"
    recipe = seed("mistral_7b_remax", "reward={kind: sum, parts: " + parts + "}")
    found = planned(recipe)
    assert [role.name for role in found.roles] == ["rollout", "reward rm", "reward right", "learner"]
    assert sum(actor.gpus for node in found.placed for actor in node) == 8
    assert found.steps[384].reward == pytest.approx(planned(seed("mistral_7b_remax")).steps[384].reward)
    assert found.split is not None
    assert set(found.split[0]) == {"rollout.actors", "learner.ranks"}
    assert planned(seed("mistral_7b_remax", "reward.gpus_per_worker=0")).steps[384].reward == 0


def test_the_commands_of_the_pages(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [
        documented("c2f-ray plan configs/mistral_c2f.yaml"),
        documented("c2f-ray plan configs/mistral_c2f.yaml --gpus 16"),
        documented("c2f-ray plan configs/mistral_c2f.yaml --cluster cluster/gcp.yaml"),
        documented("c2f-ray plan configs/mistral_c2f.yaml --cluster cluster/gcp.yaml learner.ranks=4"),
        documented("c2f-ray plan configs/mistral_c2f.yaml --gpus 8 --gpu H100"),
    ]
    assert [CliRunner().invoke(app, command).exit_code for command in commands] == [0, 0, 0, 0, 1]  # as a page says
