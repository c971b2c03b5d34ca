"""Fine-tuning on kept responses with real DeepSpeed ranks, against plain torch in float64."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from test_learner import (
    LR,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    clipped_gradients,
    distance,
    recipe,
    response_logprobs,
    save_policy,
    trajectories,
)
from transformers import AutoModelForCausalLM

from c2f_ray.algorithms.rejection_sampling import RejectionSampling
from c2f_ray.data.trajectory import Trajectories
from c2f_ray.learner.batching import UpdateBatch
from c2f_ray.learner.group import LearnerGroup
from c2f_ray.recipe import Recipe

KEPT = np.array([0, 4, 6, 10, 14, 18, 22])  # sample 22 is sample 4 again
EPOCHS, PER_UPDATE = 2, 4


def sft(policy: Path) -> Recipe:
    whole = recipe(policy).model_dump()
    learner = {
        "algorithm": "rejection_sampling", "restart_from": "start", "epochs": EPOCHS,
        "responses_per_update": PER_UPDATE, "optimizer": whole["learner"]["optimizer"], "gpus_per_rank": 0, "ranks": 2,
        "timeout_s": 1800,
    }  # fmt: skip
    whole["prompts"] |= {"per_step": 8}
    whole["rollout"] |= {"samples_per_prompt": 2}
    return Recipe.model_validate(whole | {"learner": learner, "evaluate": {"prompts": "heldout.jsonl"}})


def with_a_duplicate() -> Trajectories:
    """Two shards in one; sample 22 has the prompt and the response of sample 4."""
    everything = trajectories(0)
    rows = np.arange(24)
    rows[list(everything.info.sample_id).index(22)] = list(everything.info.sample_id).index(4)
    doubled = everything.select(rows)
    doubled.info.sample_id[:] = everything.info.sample_id
    return doubled


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory) -> SimpleNamespace:
    """An update, then back to the start and the same update again."""
    run = SimpleNamespace(policy=save_policy(tmp_path_factory.mktemp("policy")), folder=tmp_path_factory.mktemp("sft"))
    group = LearnerGroup(sft(run.policy), RejectionSampling, 3)
    group.wait_until_ready()
    (run.folder / "start").mkdir()
    group.save(run.folder / "start")
    batch = UpdateBatch(KEPT[::-1], np.ones(len(KEPT), np.float32), None)
    everything = with_a_duplicate()
    shards = [ray.put(everything.select(rows)) for rows in np.split(np.arange(24), [9])]
    run.metrics, run.moments = [], []
    for name in ("first", "again"):
        run.metrics.append(group.update(shards, batch))
        run.moments.append(ray.get([rank.__ray_call__.remote(clipped_gradients) for rank in group.ranks])[0])
        group.export(run.folder / name, "")
        group.load(run.folder / "start")
    group.close()
    return run


def test_an_update_equals_plain_torch(run):
    """Four optimizer steps: two of each epoch, over the six distinct responses."""
    model = AutoModelForCausalLM.from_pretrained(run.policy, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    everything = with_a_duplicate()
    rows = {int(sample): row for row, sample in enumerate(everything.info.sample_id)}
    total, steps = 0.0, 0
    for epoch in range(EPOCHS):
        order = np.random.default_rng([0, 0, epoch]).permutation(6)
        for part in (order[:PER_UPDATE], order[PER_UPDATE:]):
            texts = [(everything.prompt[rows[i]], everything.response[rows[i]]) for i in KEPT[:6][part]]
            losses = torch.cat([-response_logprobs(model, *text) for text in texts])
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.param_groups[0]["lr"] = LR if steps == 0 else LR * (1 - (steps - 1) / 3)
            optimizer.step()
            optimizer.zero_grad()
            total, steps = total + float(losses.sum()), steps + 1
    tokens = sum(len(everything.response[rows[i]]) for i in KEPT[:6])
    found = run.metrics[0]
    assert (found["learner/responses"], found["learner/duplicates"], found["learner/steps"]) == (6, 1, 4)
    assert found["learner/tokens"] == tokens
    assert found["learner/loss"] == pytest.approx(total / tokens / EPOCHS, rel=1e-5)
    start = AutoModelForCausalLM.from_pretrained(run.policy).state_dict()
    weights = AutoModelForCausalLM.from_pretrained(run.folder / "first").state_dict()
    assert distance(weights, model.state_dict()) < 1e-6
    assert distance(weights, model.state_dict(), start) < 1e-3


def test_a_round_that_starts_over_forgets_the_one_before(run):
    """Weights, moments and the schedule's steps are those of the start; only the order of samples is drawn anew."""
    weights = [(run.folder / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    assert run.metrics[0]["learner/lr"] == run.metrics[1]["learner/lr"] == pytest.approx(LR / 3)
    assert all(torch.equal(run.moments[0][name], moment) for name, moment in run.moments[1].items())
