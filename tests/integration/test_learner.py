"""The learner with real DeepSpeed ranks over gloo, against a plain single-process computation of the same update."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from c2f_ray.algorithms.remax import ReMax
from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.errors import ActorDiedError, DeadlineError, NonFiniteUpdateError
from c2f_ray.learner.batching import Samples, UpdateBatch, plan, split_by_tokens
from c2f_ray.learner.group import LearnerGroup
from c2f_ray.recipe import Recipe

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks cannot import this file
VOCABULARY = 64
UPDATES = 2
SMALL = 40  # tokens in a micro-batch
SHARD_BYTES = 150_000
LR, WEIGHT_DECAY, MAX_GRAD_NORM, KL, CLIP = 3e-4, 0.1, 0.05, 0.2, 0.8
SAMPLER_LOGPROB, IMPORTANCE_CLIP = -4.0, 1.5


def recipe(policy: Path, **learner) -> Recipe:
    optimizer = {
        "lr": LR, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM, "schedule": "linear",
        "warmup_steps": 1,
    }  # fmt: skip
    remax = {
        "algorithm": "remax", "kl_coefficient": KL, "reward_clip": CLIP, "importance_clip": IMPORTANCE_CLIP,
        "gpus_per_rank": 0, "timeout_s": 1800,
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "run": {"name": "test", "steps": UPDATES, "deterministic": True},
            "policy": {"model": str(policy), "dtype": "float32"},
            "prompts": {"source": "prompts.jsonl"},
            "length": {"rule": "fixed", "max_tokens": 32},
            "rollout": {"gpus_per_actor": 0},
            "weights": {"timeout_s": learner.get("timeout_s", 600)},
            "reward": {"kind": "function", "function": "rewards:score"},
            "learner": remax | {"optimizer": optimizer} | learner,
        }
    )


def trajectories(seed: int) -> Trajectories:
    """12 prompts with a sample and a greedy rollout each; ids are shuffled, the greedy ones odd."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(24)
    prompts = [rng.integers(3, VOCABULARY, rng.integers(2, 12)) for _ in ids]
    responses = [rng.integers(3, VOCABULARY, 90 if i == 0 else rng.integers(1, 16)) for i in ids]  # one in the tail
    info = TrajectoryInfo(
        sample_id=ids.astype(np.int64),
        prompt_row=ids // 2,
        greedy=ids % 2 == 1,
        finished=np.ones(24, bool),
        interrupted=np.zeros(24, bool),
        prompt_tokens=np.array([len(row) for row in prompts], np.int32),
        response_tokens=np.array([len(row) for row in responses], np.int32),
        weight_version=np.zeros(24, np.int32),
    )
    return Trajectories(
        info,
        Ragged.from_rows(prompts, np.int32),
        Ragged.from_rows(responses, np.int32),
        Ragged.from_rows([np.full(len(row), SAMPLER_LOGPROB) for row in responses], np.float32),
        Ragged.from_rows([np.zeros(len(row)) for row in responses], np.int32),
    )


def shards(everything: Trajectories, order: int = 1) -> list:
    """Three shards of uneven size; `order` -1 puts them, and their rows, the other way round."""
    return [ray.put(everything.select(rows[::order])) for rows in np.split(np.arange(24), [5, 14])][::order]


def batch(seed: int, order: int = 1) -> UpdateBatch:
    rng = np.random.default_rng(seed + 100)
    reward, baseline = rng.normal(size=(2, 12)).astype(np.float32)
    return UpdateBatch(np.arange(0, 24, 2)[::order], reward[::order], baseline[::order])


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


def save_policy(folder: Path) -> Path:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def learn(policy: Path, folder: Path, order: int = 1, **learner) -> SimpleNamespace:
    """UPDATES updates by a group of its own."""
    group = LearnerGroup(recipe(policy, **learner), ReMax, UPDATES)
    group.wait_until_ready()
    run = SimpleNamespace(metrics=[], folder=folder)
    for update in range(UPDATES):
        run.metrics.append(group.update(shards(trajectories(update), order), batch(update, order)))
        if update == 0:
            run.gradients = ray.get([rank.__ray_call__.remote(clipped_gradients) for rank in group.ranks])[0]
    run.logprobs = group.logprobs(shards(trajectories(0), order))
    run.reference = ray.get([rank.__ray_call__.remote(elements_of_reference) for rank in group.ranks])
    group.export(folder, "{{ messages }}")
    ray.get(
        [
            rank.__ray_call__.remote(export_in_small_shards, folder.with_name(folder.name + "_shards"))
            for rank in group.ranks
        ]
    )
    group.close()
    run.weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return run


def elements_of_reference(rank) -> int:
    """That a rank owns."""
    return sum(getattr(p, "ds_tensor", p).numel() for p in rank.algorithm.reference.parameters())


def export_in_small_shards(rank, folder: Path) -> None:
    from c2f_ray.learner import export

    export.MAX_SHARD_BYTES = SHARD_BYTES
    rank.export(folder, "{{ messages }}")


def clipped_gradients(rank) -> dict:
    """After a first update AdamW's first moment is (1 - beta1) times the clipped gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = rank.policy.engine.optimizer
    without_zero = rank.learner.zero_stage == 0  # which DeepSpeed's function does not know
    moments = {
        name: optimizer.state[p]["exp_avg"] if without_zero else safe_get_full_optimizer_state(p, "exp_avg")
        for name, p in rank.policy.module.model.named_parameters()
        if p.requires_grad
    }
    return {name: moment.clone() / 0.1 for name, moment in moments.items()}


@pytest.fixture(scope="module")
def runs(cluster, policy, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("runs")
    return SimpleNamespace(
        two=learn(policy, folder / "two", ranks=2),
        other_order=learn(policy, folder / "other_order", order=-1, ranks=2),
        one=learn(policy, folder / "one", ranks=1),
        zero0=learn(policy, folder / "zero0", ranks=2, zero_stage=0),
        zero1_small=learn(policy, folder / "small", ranks=2, zero_stage=1, tokens_per_microbatch=SMALL),
        zero3_small=learn(policy, folder / "zero3", ranks=2, zero_stage=3, tokens_per_microbatch=SMALL),
        packed=learn(policy, folder / "packed", ranks=2, packing=True, tokens_per_microbatch=SMALL),
    )


def plain_updates(policy: Path, dtype: torch.dtype, adapter: Path | None = None) -> SimpleNamespace:
    """The same updates with nothing but torch: one sequence at a time, loops over tokens, torch's AdamW and clip.

    With nothing but PEFT as well, where there is an adapter to learn in the model's place.
    """
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    reference = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    plain = SimpleNamespace(loss=[], kl=[], norm=[])
    for update, lr in enumerate([LR, LR]):  # warm-up's only update, then the first of the linear fall
        everything, scores = trajectories(update), batch(update)
        rows = {int(i): row for row, i in enumerate(everything.info.sample_id)}
        loss, kl_sum, tokens = 0.0, 0.0, 0
        for sample, reward, baseline in zip(scores.sample_id, scores.reward, scores.baseline, strict=True):
            prompt, response = everything.prompt[rows[sample]], everything.response[rows[sample]]
            logprobs = response_logprobs(model, prompt, response)
            kl = (logprobs - response_logprobs(reference, prompt, response)).detach()
            advantage = min(max(float(reward) - float(baseline), -CLIP), CLIP)
            for t in range(len(response)):
                weight = min(float((logprobs[t].detach() - SAMPLER_LOGPROB).exp()), IMPORTANCE_CLIP)
                loss = loss - weight * (advantage - KL * sum(kl[t:])) * logprobs[t]
            kl_sum += float(kl.sum())
            tokens += len(response)
        loss = loss / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learning.values(), MAX_GRAD_NORM)
        if update == 0:
            plain.gradients = {name: p.grad.clone() for name, p in learning.items()}
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        plain.loss.append(loss.item())
        plain.kl.append(kl_sum / len(scores.sample_id))
        plain.norm.append(norm.item())
    plain.weights = (model if adapter is None else model.merge_and_unload()).state_dict()
    return plain


def response_logprobs(model, prompt, response) -> torch.Tensor:
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), ids[len(prompt) :]]


@pytest.fixture(scope="module")
def plain(policy) -> SimpleNamespace:
    return plain_updates(policy, torch.float64)


def distance(ours: dict, theirs: dict, start: dict | None = None) -> float:
    """Norm of the difference, relative to the norm of `theirs` (counted from `start`), over all tensors together."""
    difference = sum((ours[n].double() - theirs[n].double()).square().sum() for n in theirs)
    size = sum((theirs[n].double() - (start[n].double() if start else 0)).square().sum() for n in theirs)
    return float((difference / size).sqrt())


def test_updates_equal_plain_torch(runs, plain, policy):
    """In float32 against float64: rounding, and what AdamW makes of it where a gradient is almost zero."""
    assert runs.two.gradients.keys() == plain.gradients.keys()
    assert distance(runs.two.gradients, plain.gradients) < 3e-6
    assert distance(runs.two.weights, plain.weights) < 2e-7
    start = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert distance(runs.two.weights, plain.weights, start) < 1e-4
    for update, metrics in enumerate(runs.two.metrics):
        assert metrics["learner/loss"] == pytest.approx(plain.loss[update], rel=2e-6)
        assert metrics["learner/grad_norm"] == pytest.approx(plain.norm[update], rel=2e-6)
        assert metrics["kl/sequence"] == pytest.approx(plain.kl[update], rel=1e-3, abs=1e-6)
    assert plain.norm[0] > 10 * MAX_GRAD_NORM  # so that the clip has been tried
    assert abs(plain.kl[1]) > 1e-3  # and the KL


def test_metrics_of_the_first_update(runs, policy):
    everything = trajectories(0)
    sampled = everything.select(np.flatnonzero(~everything.info.greedy))
    model = AutoModelForCausalLM.from_pretrained(policy)
    logprobs = [response_logprobs(model, p, r).detach() for p, r in zip(sampled.prompt, sampled.response, strict=True)]
    gaps = (torch.cat(logprobs) - SAMPLER_LOGPROB).abs()
    weights = (torch.cat(logprobs) - SAMPLER_LOGPROB).exp().clamp(max=IMPORTANCE_CLIP).double()
    metrics = runs.two.metrics[0]
    assert metrics["learner/tokens"] == sum(sampled.response.lengths) == len(gaps)
    assert metrics["logprob_gap/max"] == pytest.approx(float(gaps.max()), rel=1e-6)
    assert metrics["logprob_gap/mean"] == pytest.approx(float(gaps.mean()), rel=1e-6)
    assert metrics["importance/max"] == pytest.approx(IMPORTANCE_CLIP)
    assert metrics["importance/mean"] == pytest.approx(float(weights.mean()), rel=1e-6)
    effective = float(weights.sum() ** 2 / weights.square().sum()) / len(weights)
    assert metrics["importance/effective"] == pytest.approx(effective, rel=1e-6)
    assert 0.05 < effective < 0.95
    assert metrics["kl/sequence"] == metrics["kl/token"] == 0.0  # the policy still is its reference
    assert [m["learner/lr"] for m in runs.two.metrics] == [LR, LR]
    lengths = sampled.prompt.lengths + sampled.response.lengths
    in_order = lengths[np.argsort(sampled.info.sample_id)]
    # One micro-batch on each rank; each is padded to its longest row.
    padded = sum(max(in_order[rows]) * len(rows) for rows in split_by_tokens(in_order, 2))
    assert metrics["learner/padding_waste"] == pytest.approx(1 - lengths.sum() / padded)


def test_small_micro_batches_leave_a_rank_without_rows():
    """So that what holds of them holds of empty ones too."""
    lengths = Samples([trajectories(0)]).lengths
    assert min(len(rows) for micro in plan(lengths, 2, SMALL) for rows in micro) == 0
    assert max(len(micro) for micro in plan(lengths, 2, SMALL)) > 4


@pytest.mark.parametrize("name", ["one", "zero0", "zero1_small", "zero3_small", "packed"])
def test_layout_changes_rounding_only(runs, name):
    other = getattr(runs, name)
    assert distance(other.gradients, runs.two.gradients) < 1e-6
    assert distance(other.weights, runs.two.weights) < 1e-7
    if name == "zero1_small":
        assert other.metrics[0]["learner/padding_waste"] < runs.two.metrics[0]["learner/padding_waste"]
    if name == "packed":
        lengths = Samples([trajectories(0)]).lengths
        idle = sum(len(rows) == 0 for micro in plan(lengths, 2, SMALL, packing=True) for rows in micro)
        assert other.metrics[0]["learner/padding_waste"] == pytest.approx(idle / (sum(lengths) + idle))


def test_neither_the_order_of_micro_batches_nor_padding_matters(policy, runs):
    """Two ranks, some of whose micro-batches are turned round, and whose padding is random tokens."""
    group = LearnerGroup(recipe(policy, ranks=2, tokens_per_microbatch=SMALL), ReMax, UPDATES)
    group.wait_until_ready()
    ray.get([rank.__ray_call__.remote(shuffle_and_fill_padding) for rank in group.ranks])
    metrics = group.update(shards(trajectories(0)), batch(0))
    gradients = ray.get([rank.__ray_call__.remote(clipped_gradients) for rank in group.ranks])[0]
    assert any(ray.get([rank.__ray_call__.remote(lambda rank: rank.filled > 0) for rank in group.ranks]))
    group.close()
    assert distance(gradients, runs.two.gradients) < 1e-6
    assert metrics["learner/loss"] == pytest.approx(runs.two.metrics[0]["learner/loss"], rel=1e-6)


def shuffle_and_fill_padding(rank) -> None:
    from c2f_ray.algorithms import base
    from c2f_ray.learner.batching import Samples

    plan_of_rank, micro_batch = base.rank_plan, Samples.micro_batch

    def turned_round(*args) -> list:
        planned = plan_of_rank(*args)
        chunks = max(num_chunks for _, num_chunks in planned)
        return [(rows, chunks) for rows, _ in reversed(planned)]

    def filled(samples, rows):
        micro = micro_batch(samples, rows)
        if len(rows):
            padding = np.arange(micro.input_ids.shape[1]) >= samples.lengths[rows][:, None]
            rank.filled = getattr(rank, "filled", 0) + padding.sum()
            micro.input_ids[torch.from_numpy(padding)] = torch.randint(3, VOCABULARY, (int(padding.sum()),))
        return micro

    base.rank_plan, Samples.micro_batch = turned_round, filled


def test_the_same_updates_give_the_same_bytes_in_any_order(runs):
    files = sorted(path.name for path in runs.two.folder.iterdir())
    assert files == sorted(path.name for path in runs.other_order.folder.iterdir())
    for file in files:
        assert (runs.two.folder / file).read_bytes() == (runs.other_order.folder / file).read_bytes(), file
    timeless = [
        [{name: value for name, value in metrics.items() if not name.startswith("time/")} for metrics in run.metrics]
        for run in (runs.two, runs.other_order)
    ]
    assert timeless[0] == timeless[1]


def test_the_exported_folder_is_the_learners_policy(runs, policy):
    model = AutoModelForCausalLM.from_pretrained(runs.two.folder)
    everything = trajectories(0)
    sampled = [row for row, greedy in enumerate(everything.info.greedy) if not greedy]
    assert sorted(runs.two.logprobs) == sorted(everything.info.sample_id[sampled].tolist())
    for row in sampled:
        expected = response_logprobs(model, everything.prompt[row], everything.response[row]).detach().numpy()
        np.testing.assert_allclose(runs.two.logprobs[int(everything.info.sample_id[row])], expected, rtol=0, atol=2e-6)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (runs.two.folder / file).read_bytes() == (policy / file).read_bytes()
    assert not runs.two.folder.with_name("two.partial").exists()


def test_under_zero3_each_rank_owns_half_of_the_reference(runs):
    whole = sum(tensor.numel() for tensor in runs.two.weights.values())
    assert runs.two.reference == [whole, whole]
    assert runs.zero3_small.reference == [whole // 2, whole // 2]


@pytest.mark.parametrize("name", ["two", "zero3_small"])
def test_the_exported_folder_is_what_transformers_would_save(runs, name, tmp_path):
    ours = getattr(runs, name).folder
    AutoModelForCausalLM.from_pretrained(ours).save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    for file in files:
        assert (ours / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize("name", ["two", "zero3_small"])
def test_a_large_model_is_exported_in_several_files(runs, name, tmp_path):
    whole = getattr(runs, name).folder
    ours = whole.with_name(whole.name + "_shards")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size=SHARD_BYTES)
    index, theirs = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (ours, tmp_path))
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert len(list(ours.glob("model-0000?-of-00004.safetensors"))) == 4
    expected = load_file(whole / "model.safetensors")
    for file in ours.glob("*.safetensors"):
        assert file.stat().st_size < SHARD_BYTES + 2000  # its header
        for tensor_name, tensor in load_file(file).items():
            assert index["weight_map"][tensor_name] == file.name
            assert torch.equal(tensor, expected.pop(tensor_name))
    assert not expected


@pytest.fixture(scope="module")
def broken_policy(policy, tmp_path_factory) -> Path:
    """It is not a number behind token 63."""
    folder = tmp_path_factory.mktemp("broken")
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.get_input_embeddings().weight.data[63] = torch.nan
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def broken(cluster, broken_policy):
    """Two ranks that wait for 10 s only."""
    group = LearnerGroup(recipe(broken_policy, ranks=2, timeout_s=10), ReMax, UPDATES)
    group.wait_until_ready()
    yield group
    group.close()


def test_an_update_that_is_not_finite_names_its_samples(broken):
    everything, scores = trajectories(0), batch(0)
    ids = [np.concatenate(rows)[:-1] for rows in zip(everything.prompt, everything.response, strict=True)]
    bad = [
        int(info)
        for info, greedy, row in zip(everything.info.sample_id, everything.info.greedy, ids, strict=True)
        if 63 in row and not greedy
    ]
    assert 1 < len(bad) < 10
    with pytest.raises(NonFiniteUpdateError, match=re.escape(f"not finite: samples {sorted(bad)}")):
        broken.update(shards(everything), scores)
    scores.reward[3] = np.nan  # of sample 6
    with pytest.raises(NonFiniteUpdateError, match=re.escape("rewards are not finite: samples [6]")):
        broken.update(shards(everything), scores)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_bad_update_leaves_nothing_behind(cluster, broken_policy, zero_stage):
    """No weight changes, and the next update's gradient is that of its own samples."""
    group = LearnerGroup(
        recipe(broken_policy, ranks=2, zero_stage=zero_stage, tokens_per_microbatch=64), ReMax, UPDATES
    )
    group.wait_until_ready()
    with pytest.raises(NonFiniteUpdateError, match="not finite: samples"):
        group.update(shards(trajectories(0)), batch(0))
    clean = without_token_63(trajectories(1))
    before = group.logprobs(shards(clean))
    model = AutoModelForCausalLM.from_pretrained(broken_policy, dtype=torch.float64)
    rows = {int(i): row for row, i in enumerate(clean.info.sample_id)}
    scores, loss, tokens = batch(1), 0.0, 0
    for sample, reward, baseline in zip(scores.sample_id, scores.reward, scores.baseline, strict=True):
        logprobs = response_logprobs(model, clean.prompt[rows[sample]], clean.response[rows[sample]])
        np.testing.assert_allclose(before[int(sample)], logprobs.detach().numpy(), rtol=0, atol=2e-6)
        weights = (logprobs.detach() - SAMPLER_LOGPROB).exp().clamp(max=IMPORTANCE_CLIP)
        loss = loss - min(max(float(reward) - float(baseline), -CLIP), CLIP) * (weights * logprobs).sum()
        tokens += len(logprobs)
    (loss / tokens).backward()
    norm = torch.stack([p.grad.nan_to_num(0).norm() for p in model.parameters()]).norm()
    metrics = group.update(shards(clean), scores)
    assert metrics["learner/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert metrics["learner/lr"] == LR  # the first of the schedule
    group.close()


def without_token_63(everything: Trajectories) -> Trajectories:
    for part in (everything.prompt, everything.response):
        part.values[part.values == 63] = 5
    return everything


def test_rewards_of_other_samples_are_refused(broken):
    scores = batch(0)
    scores.sample_id[0] = 99
    with pytest.raises(ValueError, match=re.escape("samples [99]")):
        broken.update(shards(trajectories(0)), scores)


def test_a_rank_that_does_not_answer_is_named(broken):
    pid = ray.get(broken.ranks[1].__ray_call__.remote(lambda rank: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeadlineError, match="learner logprobs: no answer from rank 1 of 2 after 10 s"):
        broken.logprobs(shards(trajectories(0)))
    start = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorDiedError, match="learner logprobs: a rank died"):
        broken.logprobs(shards(trajectories(0)))
    assert time.monotonic() - start < 5
