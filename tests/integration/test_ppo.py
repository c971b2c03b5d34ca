"""PPO with real DeepSpeed ranks over gloo, against a plain single-process computation of the same updates."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from test_learner import (
    SAMPLER_LOGPROB,
    VOCABULARY,
    distance,
    recipe,
    response_logprobs,
    save_policy,
    shards,
    trajectories,
)
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaModel

from c2f_ray.algorithms.ppo import PPO
from c2f_ray.learner.batching import UpdateBatch
from c2f_ray.learner.group import LearnerGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks cannot import this file
UPDATES, WARMUP, EPOCHS, MINIBATCHES = 3, 1, 2, 3
CRITIC_LR = 1e-3
COMMON = {"epochs": EPOCHS, "minibatches": MINIBATCHES, "clip_ratio": 0.1, "value_clip": 0.05, "gamma": 0.98}
# Between them every setting has both of its kinds of value.
IN_REWARD = {"kl_coefficient": 0.2, "reward_clip": 0.8}
IN_LOSS = {
    "kl_in": "loss", "kl_estimator": "k3", "kl_coefficient": 0.3, "kl_target": 0.01, "whiten_advantages": "biased",
    "normalise_reward": True, "entropy_coefficient": 0.05, "dual_clip": 1.05, "gae_lambda": 0.9,
    "importance_clip": 1.5, "kl_stop": 0.004,
}  # fmt: skip


def batch(seed: int, order: int = 1) -> UpdateBatch:
    reward = np.random.default_rng(seed + 100).normal(size=12).astype(np.float32)
    return UpdateBatch(np.arange(0, 24, 2)[::order], reward[::order], None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    """A policy, and a reward model in UltraRM's layout that reads the same token ids."""
    policy = save_policy(tmp_path_factory.mktemp("policy"))
    reward = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    config.save_pretrained(reward)
    state = {f"model.{name}": tensor for name, tensor in LlamaModel(config).state_dict().items()}
    save_file(
        state | {"regression_head.weight": torch.randn(1, 32) / 8}, reward / "model.safetensors", {"format": "pt"}
    )
    return SimpleNamespace(policy=policy, reward=reward)


def learn(folders: SimpleNamespace, folder: Path, settings: dict, order: int = 1, **learner) -> SimpleNamespace:
    """UPDATES updates by a group of its own."""
    remax = recipe(folders.policy)
    optimizer = remax.learner.optimizer.model_dump()
    critic = {
        "model": str(folders.reward) if settings is IN_LOSS else "policy", "warmup_steps": WARMUP,
        "optimizer": optimizer | {"lr": CRITIC_LR},
    }  # fmt: skip
    ppo = {"algorithm": "ppo", "critic": critic, "optimizer": optimizer, "gpus_per_rank": 0, "timeout_s": 1800}
    ours = type(remax).model_validate(remax.model_dump() | {"learner": ppo | COMMON | settings | learner})
    group = LearnerGroup(ours, PPO, UPDATES)
    group.wait_until_ready()
    run = SimpleNamespace(metrics=[], folder=folder)
    for update in range(UPDATES):
        run.metrics.append(group.update(shards(trajectories(update), order), batch(update, order)))
        if update == WARMUP - 1:
            group.export(folder.with_name(folder.name + "_warm"), "{{ messages }}")
    run.moments, run.critic = ray.get([rank.__ray_call__.remote(state_of_optimizers) for rank in group.ranks])[0]
    group.export(folder, "{{ messages }}")
    group.close()
    run.weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return run


def state_of_optimizers(rank) -> tuple[dict, dict]:
    """AdamW's first moments of both models, and the critic's weights."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    models = {"policy": rank.policy.module.model, "critic": rank.algorithm.critic.module}
    moments = {
        f"{which}.{name}": safe_get_full_optimizer_state(parameter, "exp_avg").clone()
        for which, model in models.items()
        for name, parameter in model.named_parameters()
    }
    return moments, {name: safe_get_full_fp32_param(p).clone() for name, p in models["critic"].named_parameters()}


@pytest.fixture(scope="module")
def runs(cluster, folders, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("runs")
    return SimpleNamespace(
        in_reward=learn(folders, folder / "two", IN_REWARD, ranks=2),
        other_order=learn(folders, folder / "other_order", IN_REWARD, order=-1, ranks=2),
        one=learn(folders, folder / "one", IN_REWARD, ranks=1, packing=True, tokens_per_microbatch=64),
        in_loss=learn(folders, folder / "in_loss", IN_LOSS, ranks=2, zero_stage=3, tokens_per_microbatch=40),
    )


class Plain:
    """The same updates with nothing but torch in float64: one sequence at a time, loops over tokens."""

    def __init__(self, folders: SimpleNamespace, settings: dict) -> None:
        self.settings = {
            "kl_in": "reward", "kl_target": None, "entropy_coefficient": 0.0, "gae_lambda": 0.95, "dual_clip": np.inf,
            "reward_clip": 5.0, "whiten_advantages": "unbiased", "normalise_reward": False,
            "importance_clip": None, "kl_stop": np.inf,
        } | settings  # fmt: skip
        self.beta = settings["kl_coefficient"]
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(folders.policy, dtype=torch.float64) for _ in range(2)
        )
        start = folders.reward if settings is IN_LOSS else folders.policy
        self.trunk = AutoModel.from_pretrained(start, dtype=torch.float64)
        head = torch.zeros(1, self.trunk.config.hidden_size, dtype=torch.float64)
        if settings is IN_LOSS:
            head = load_file(start / "model.safetensors")["regression_head.weight"].double()
        self.head = torch.nn.Parameter(head)
        options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
        self.policy_optimizer = torch.optim.AdamW(self.policy.parameters(), **options)
        self.critic_optimizer = torch.optim.AdamW([*self.trunk.parameters(), self.head], **options)
        self.policy_steps = self.critic_steps = 0
        self.seen: list[float] = []
        self.metrics: list[dict] = []

    def values(self, prompt, response) -> torch.Tensor:
        ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)
        return (self.trunk(ids[None]).last_hidden_state[0, len(prompt) - 1 : -1] @ self.head.T)[:, 0]

    def entropy(self, prompt, response) -> torch.Tensor:
        ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)
        logprobs = self.policy(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)

    def update(self, update: int) -> None:
        everything, scores, s = trajectories(update), batch(update), self.settings
        rows = {int(i): row for row, i in enumerate(everything.info.sample_id)}
        texts = [(everything.prompt[rows[i]], everything.response[rows[i]]) for i in scores.sample_id]
        rewards = [float(reward) for reward in scores.reward]
        self.seen += rewards
        if s["normalise_reward"]:
            rewards = [(reward - np.mean(self.seen)) / np.std(self.seen) for reward in rewards]
        with torch.no_grad():
            old = [response_logprobs(self.policy, *text) for text in texts]
            reference = [response_logprobs(self.reference, *text) for text in texts]
            old_values = [self.values(*text) for text in texts]
        advantages = []
        for reward, logp, ref, value in zip(rewards, old, reference, old_values, strict=True):
            following, after, found = 0.0, 0.0, torch.zeros_like(logp)
            for t in reversed(range(len(logp))):
                r = -self.beta * float(logp[t] - ref[t]) if s["kl_in"] == "reward" else 0.0
                if t == len(logp) - 1:
                    r += min(max(reward, -s["reward_clip"]), s["reward_clip"])
                delta = r + 0.98 * after - float(value[t])
                following = delta + 0.98 * s["gae_lambda"] * following
                found[t], after = following, float(value[t])
            advantages.append(found)
        returns = [advantage + value for advantage, value in zip(advantages, old_values, strict=True)]
        every = torch.cat(advantages)
        variance = every.var(correction=1 if s["whiten_advantages"] == "unbiased" else 0)
        white = [(found - every.mean()) / (variance + 1e-8).sqrt() for found in advantages]
        tokens = [
            list(zip(*parts, strict=True)) for parts in zip(old, reference, old_values, white, returns, strict=True)
        ]
        totals = {
            "loss": 0.0, "value": 0.0, "clipped": 0, "dual": 0, "kl": 0.0, "norms": [], "critic_norms": [], "tokens": 0,
        }  # fmt: skip
        train_policy = update >= WARMUP
        for epoch in range(EPOCHS):
            order = np.random.default_rng([0, update, epoch]).permutation(12)
            for part in np.array_split(order, MINIBATCHES):
                kl_before = totals["kl"]
                self.minibatch([texts[i] for i in part], [tokens[i] for i in part], train_policy, totals)
                if (totals["kl"] - kl_before) / sum(len(tokens[i]) for i in part) > s["kl_stop"]:
                    train_policy = False
        count = EPOCHS * len(every)
        self.metrics.append(
            {
                "critic/loss": totals["value"] / count,
                "critic/explained_variance": 1 - float(every.var() / torch.cat(returns).var()),
                "critic/grad_norm": np.mean(totals["critic_norms"]),
                "kl/coefficient": self.beta,
            }
        )
        if update >= WARMUP:
            self.metrics[-1] |= {
                "learner/loss": totals["loss"] / totals["tokens"],
                "learner/clip_fraction": totals["clipped"] / totals["tokens"],
                "learner/dual_clip_fraction": totals["dual"] / totals["tokens"],
                "learner/approx_kl": totals["kl"] / totals["tokens"],
                "learner/steps": len(totals["norms"]),
                "learner/grad_norm": np.mean(totals["norms"]),
            }
            if s["kl_target"] is not None:
                kl = float(sum((a - b).sum() for a, b in zip(old, reference, strict=True))) / 12
                self.beta *= 1 + 0.1 * min(max(kl / s["kl_target"] - 1, -0.2), 0.2)

    def minibatch(self, texts, tokens, train_policy: bool, totals: dict) -> None:
        s = self.settings
        count = sum(len(row) for row in tokens)
        policy_loss, value_loss = 0.0, 0.0
        for text, row in zip(texts, tokens, strict=True):
            new_values = self.values(*text)
            logprobs = response_logprobs(self.policy, *text)
            entropy = self.entropy(*text)
            for t, (old, reference, old_value, advantage, goal) in enumerate(row):
                near = old_value + (new_values[t] - old_value).clamp(-0.05, 0.05)
                token = 0.5 * max((new_values[t] - goal) ** 2, (near - goal) ** 2)
                value_loss = value_loss + token
                totals["value"] += token.item()
                ratio = (logprobs[t] - old).exp()
                plain, held = -advantage * ratio, -advantage * ratio.clamp(0.9, 1.1)
                token = max(plain, held)
                dual = bool(advantage < 0) and token.item() > -advantage.item() * s["dual_clip"]
                token = -advantage * s["dual_clip"] if dual else token
                weight = 1.0
                if s["importance_clip"] is not None:
                    weight = min(float((old - SAMPLER_LOGPROB).exp()), s["importance_clip"])
                policy_loss = policy_loss + weight * token - s["entropy_coefficient"] * entropy[t]
                if s["kl_in"] == "loss":
                    gap = reference - logprobs[t]
                    policy_loss = policy_loss + self.beta * (gap.exp() - 1 - gap)
                if train_policy:
                    totals["loss"] += token.item()
                    totals["clipped"] += bool(held > plain)
                    totals["dual"] += dual
                    totals["kl"] += (ratio - 1 - ratio.log()).item()
                    totals["tokens"] += 1
        critic = [*self.trunk.parameters(), self.head]
        total_steps = UPDATES * EPOCHS * MINIBATCHES
        totals["critic_norms"].append(
            self.step(value_loss / count, critic, self.critic_optimizer, CRITIC_LR, self.critic_steps, total_steps)
        )
        self.critic_steps += 1
        if train_policy:
            total_steps -= WARMUP * EPOCHS * MINIBATCHES
            parameters = list(self.policy.parameters())
            totals["norms"].append(
                self.step(policy_loss / count, parameters, self.policy_optimizer, 3e-4, self.policy_steps, total_steps)
            )
            self.policy_steps += 1

    def step(self, loss, parameters, optimizer, lr: float, step: int, total_steps: int) -> float:
        """Warm-up's only step at the full rate, then the linear fall; clipped at a norm of 0.05."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.param_groups[0]["lr"] = lr if step == 0 else lr * (1 - (step - 1) / (total_steps - 1))
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    def state(self) -> SimpleNamespace:
        critic = {f"model.{name}": p for name, p in self.trunk.named_parameters()} | {"head.weight": self.head}
        moments = {f"policy.{n}": self.policy_optimizer.state[p]["exp_avg"] for n, p in self.policy.named_parameters()}
        moments |= {f"critic.{name}": self.critic_optimizer.state[p]["exp_avg"] for name, p in critic.items()}
        weights = {name: p.detach() for name, p in critic.items()}
        return SimpleNamespace(policy=self.policy.state_dict(), critic=weights, moments=moments, metrics=self.metrics)


@pytest.fixture(scope="module", params=[IN_REWARD, IN_LOSS], ids=["in_reward", "in_loss"])
def pair(request, runs, folders) -> SimpleNamespace:
    """A run and its plain twin."""
    plain = Plain(folders, request.param)
    for update in range(UPDATES):
        plain.update(update)
    ours = runs.in_loss if request.param is IN_LOSS else runs.in_reward
    start = AutoModelForCausalLM.from_pretrained(folders.policy).state_dict()
    return SimpleNamespace(ours=ours, plain=plain.state(), start=start)


def test_updates_equal_plain_torch(pair):
    """In float32 against float64: 18 optimizer steps of the critic and 12 of the policy, each after its clips."""
    ours, plain = pair.ours, pair.plain
    assert ours.moments.keys() == plain.moments.keys()
    assert distance(ours.moments, plain.moments) < 5e-6
    assert distance(ours.weights, plain.policy) < 1e-6
    assert distance(ours.weights, plain.policy, pair.start) < 1e-4
    assert distance(ours.critic, plain.critic) < 1e-6


def test_metrics_equal_plain_torch(pair):
    for ours, plain in zip(pair.ours.metrics, pair.plain.metrics, strict=True):
        for name, value in plain.items():
            assert ours[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    last = pair.plain.metrics[-1]
    steps = [metrics["learner/steps"] for metrics in pair.plain.metrics[WARMUP:]]
    stopped = last["learner/dual_clip_fraction"] > 0  # the run that has kl_stop has the second clip as well
    assert steps == ([4, 4] if stopped else [EPOCHS * MINIBATCHES] * 2)
    assert 0.05 < last["learner/clip_fraction"] < 0.95, "so that the clip has been tried"
    assert len({metrics["kl/coefficient"] for metrics in pair.plain.metrics}) == (
        2 if last["learner/dual_clip_fraction"] else 1
    )


def test_layout_changes_rounding_only(runs):
    """One rank in micro-batches of 64 tokens against two ranks with one micro-batch each."""
    assert distance(runs.one.moments, runs.in_reward.moments) < 1e-5
    assert distance(runs.one.weights, runs.in_reward.weights) < 1e-6
    assert distance(runs.one.critic, runs.in_reward.critic) < 1e-6


def test_warm_up_leaves_the_policy_alone(runs, folders):
    warm = load_file(runs.in_reward.folder.with_name("two_warm") / "model.safetensors")
    start = load_file(folders.policy / "model.safetensors")
    assert all(torch.equal(warm[name], start[name]) for name in start)
    first, second, _ = runs.in_reward.metrics
    assert "learner/loss" not in first
    # The sixth step of a policy's 12, and of a critic's 18: warm-up is over after one, and the rate falls from there.
    assert second["learner/lr"] == pytest.approx(3e-4 * (1 - 4 / 11))
    assert first["critic/lr"] == pytest.approx(CRITIC_LR * (1 - 4 / 17))
    assert first["critic/value_mean"] == 0.0  # a critic from the policy starts with a head of zeros


def test_the_same_updates_give_the_same_bytes_in_any_order(runs):
    files = sorted(path.name for path in runs.in_reward.folder.iterdir())
    assert "model.safetensors" in files
    for file in files:
        assert (runs.in_reward.folder / file).read_bytes() == (runs.other_order.folder / file).read_bytes(), file
    assert all(torch.equal(runs.in_reward.critic[name], other) for name, other in runs.other_order.critic.items())
    timeless = [
        [{name: value for name, value in metrics.items() if not name.startswith("time/")} for metrics in run.metrics]
        for run in (runs.in_reward, runs.other_order)
    ]
    assert timeless[0] == timeless[1]
