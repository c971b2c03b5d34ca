"""Training of the three models, each a stage; run by `world.py` as `python -m c2f_ray.tiny.train`.

A stage reads what earlier stages saved, writes its own folder, and prints JSON lines on stdout: progress while it
works and one `result` at its end. Stages run in processes of their own, so that two can train at once.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import MistralForCausalLM

from c2f_ray.tiny import corpus, gates, models
from c2f_ray.tiny.settings import Settings
from c2f_ray.tiny.tokenizer import policy_tokenizer, reward_tokenizer


def report(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def optimizer(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)


def apply_gradient(model: torch.nn.Module, optim: torch.optim.AdamW, loss: torch.Tensor, lr: float) -> None:
    optim.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optim.param_groups:
        group["lr"] = lr
    optim.step()


def train_base(settings: Settings) -> tuple[MistralForCausalLM, dict[str, float]]:
    """A base at constant learning rate until it derives reliably (the transition is abrupt), then a cool-down."""
    torch.manual_seed(settings.seed)
    rng = random.Random(f"base {settings.seed}")
    tokenizer = policy_tokenizer(False)
    model = models.new_policy(settings)
    optim = optimizer(model, settings.base_lr)
    probe = gates.derivation_probe(settings.seed, tokenizer)

    def step(lr: float, num_pages: int, page_tokens: int, list_share: float) -> None:
        ids, weights = corpus.base_batch(rng, tokenizer, num_pages, page_tokens, list_share)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none")
        weight = weights[:, 1:].reshape(-1)
        apply_gradient(model, optim, (losses * weight).sum() / weight.sum(), lr)

    right, done = 0.0, 0
    while done < settings.base_max_steps:
        step(
            settings.base_lr * min(1.0, (done + 1) / settings.base_warmup_steps),
            settings.base_pages,
            settings.base_page_tokens,
            settings.base_list_share,
        )
        done += 1
        if done % 50 == 0:
            right = gates.forced_derivations(model, probe)
            report(stage="base", fraction=min(0.6, 0.6 * done / settings.base_min_steps), step=done, right=right)
            if done >= settings.base_min_steps and right >= settings.base_gate:
                break
    pages = settings.base_pages * settings.base_page_tokens // settings.base_cooldown_page_tokens
    for i in range(settings.base_cooldown_steps):
        lr = settings.base_lr * (1 - i / settings.base_cooldown_steps)
        step(lr, pages, settings.base_cooldown_page_tokens, settings.base_cooldown_list_share)
        if i % 50 == 49:
            report(stage="base", fraction=0.6 + 0.4 * i / settings.base_cooldown_steps)
    right = gates.forced_derivations(model, probe)
    if settings.gated and right < settings.base_gate:
        raise gates.GateError(
            f"the base derives {right:.1%} of the probe questions rightly after {done} steps, below the gate of "
            f"{settings.base_gate:.0%}: try another seed, or raise base_max_steps"
        )
    return model, {"forced_derivations": right, "steps": done + settings.base_cooldown_steps}


def train_instruct(settings: Settings, model: MistralForCausalLM) -> MistralForCausalLM:
    """The base fine-tuned to answer at once and stop; a few short derivations stay in, or no merge would find them."""
    torch.manual_seed(settings.seed)
    rng = random.Random(f"instruct {settings.seed}")
    tokenizer = policy_tokenizer(False)
    optim = optimizer(model, settings.instruct_lr)
    model.train()
    for i in range(settings.instruct_steps):
        ids, labels = corpus.instruct_batch(rng, tokenizer, settings)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=corpus.IGNORED)
        apply_gradient(model, optim, loss, settings.instruct_lr * (1 - i / settings.instruct_steps))
        if i % 20 == 19:
            report(stage="instruct", fraction=(i + 1) / settings.instruct_steps)
    return model


def train_pair(settings: Settings, base: MistralForCausalLM, folder: Path) -> None:
    """The log-ratio reward's two Mixtrals: the reference knows all styles, the policy prefers right derivations.

    So the ratio is high for what a right derivation that ends has and other responses have not.
    """
    torch.manual_seed(settings.seed)
    rng = random.Random(f"pair {settings.seed}")
    tokenizer = reward_tokenizer()
    model = models.new_mixtral(settings, base)
    total = settings.pair_reference_steps + settings.pair_policy_steps
    done = 0
    for name, steps in (("reference", settings.pair_reference_steps), ("policy", settings.pair_policy_steps)):
        optim = optimizer(model, settings.pair_lr)
        model.train()
        for i in range(steps):
            derived_share = settings.pair_derived_share if name == "policy" else 0.0
            ids, labels = corpus.pair_batch(rng, tokenizer, settings.pair_rows, derived_share, settings.pair_junk_share)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=corpus.IGNORED)
            apply_gradient(model, optim, loss, settings.pair_lr * (1 - i / steps))
            done += 1
            if done % 20 == 0:
                report(stage="pair", fraction=done / total, loss=loss.item())
        models.save_mixtral(model, folder / f"pair_{name}")


def preference_loss(scores: torch.Tensor, utilities: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry over prefixes (ours), with soft labels `sigmoid(u_i - u_j)`; rows 2i and 2i+1 are rivals.

    Every prefix of a response competes with every prefix of its rival, which puts whole responses on one scale, and
    with itself less its last token, which says where it went wrong. Arguments `[2 * prompts, time]`; a scalar.
    """
    margins = scores[0::2, :, None] - scores[1::2, None, :]
    labels = torch.sigmoid(utilities[0::2, :, None] - utilities[1::2, None, :])
    valid = scored[0::2, :, None] & scored[1::2, None, :]
    rivals = F.binary_cross_entropy_with_logits(margins[valid], labels[valid])
    gains = utilities.diff(dim=1)
    judged = scored[:, 1:] & (gains != 0)
    steps = F.binary_cross_entropy_with_logits(scores.diff(dim=1)[judged], torch.sigmoid(gains[judged]))
    return rivals + steps


def train_reward(settings: Settings, base: MistralForCausalLM) -> tuple[models.RewardModel, dict[str, float]]:
    """A reward model from the base's weights, gated on minimal pairs.

    Telling right from wrong is learned abruptly, as deriving was: so short responses, which are cheap, at a constant
    learning rate until answers one digit apart are told apart; then long ones while the rate falls.
    """
    torch.manual_seed(settings.seed)
    rng = random.Random(f"reward {settings.seed}")
    tokenizer = reward_tokenizer()
    model = models.new_reward(settings, base)
    optim = optimizer(model, settings.reward_lr)

    def step(lr: float, num_prompts: int, max_checks: int) -> None:
        ids, attended, utilities, scored = corpus.reward_batch(
            rng, tokenizer, num_prompts, max_checks, settings.reward_max_response
        )
        apply_gradient(model, optim, preference_loss(model(ids, attended), utilities, scored), lr)

    done, told = 0, 0.0
    while done < settings.reward_max_steps:
        lr = settings.reward_lr * min(1.0, (done + 1) / 20)
        step(lr, settings.reward_prompts, rng.choice((0, 0, 1)))
        done += 1
        if done % 25 == 0:
            told = gates.pair_rates(model, settings.seed, 50, ("final digit", "final digit, other root"))["mean"]
            report(stage="reward", fraction=min(0.6, 0.6 * done / settings.reward_min_steps), step=done, told=told)
            if done >= settings.reward_min_steps and told >= settings.reward_told:
                break
    for i in range(settings.reward_long_steps):
        step(
            settings.reward_lr * (1 - i / settings.reward_long_steps),
            settings.reward_prompts // 2,
            rng.choice((1, 4, 9)),
        )
        if i % 20 == 19:
            report(stage="reward", fraction=0.6 + 0.4 * (i + 1) / settings.reward_long_steps)
    if not settings.gated:
        return model, {}
    rates = gates.pair_rates(model.eval(), settings.seed)
    worst = min(rates.values())
    if rates["mean"] < settings.reward_mean_gate or worst < settings.reward_worst_gate:
        raise gates.GateError(
            f"the reward model ranks {rates['mean']:.1%} of the probe pairs rightly, {worst:.1%} in the worst kind, "
            f"where the gates are {settings.reward_mean_gate:.0%} and {settings.reward_worst_gate:.0%} ({rates}): try "
            "another seed, or raise reward_max_steps"
        )
    return model, {"steps": done + settings.reward_long_steps, **rates}


def run_stage(stage: str, folder: Path, settings: Settings) -> None:
    """Train one stage, save it below `folder`, report its wall time and gate numbers."""
    began = time.monotonic()
    gate: dict[str, float] = {}
    if stage == "base":
        base, gate = train_base(settings)
        models.save_policy(base, folder / "base", with_template=False)
    elif stage == "instruct":
        instruct = train_instruct(settings, models.load_policy(folder / "base"))
        models.save_policy(instruct, folder / "instruct", with_template=True)
    elif stage == "pair":
        train_pair(settings, models.load_policy(folder / "base"), folder)
    else:
        reward, gate = train_reward(settings, models.load_policy(folder / "base"))
        models.save_reward(reward, folder / "reward")
    report(stage=stage, fraction=1.0, result={"seconds": time.monotonic() - began, **gate})


def main() -> None:
    """`python -m c2f_ray.tiny.train FOLDER SETTINGS_JSON NUM_THREADS STAGE...`"""
    folder, settings_json, num_threads, *stages = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    for stage in stages:
        run_stage(stage, Path(folder), Settings(**json.loads(settings_json)))


if __name__ == "__main__":
    main()
