"""Trains the tiny world, which the package ships as data: `python -m c2f_ray.tiny.train FOLDER`.

A tool of the maintainers: users, demo and tests read the shipped files. Two runs on one machine with the same settings
write the same bytes; another CPU rounds otherwise and so trains other models, which may miss a gate. Everything that
was trained is kept even then, and the manifest says what was measured.
"""

import argparse
import platform
import random
import re
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import MistralForCausalLM

from c2f_ray.tiny import corpus, gates, models
from c2f_ray.tiny.manifest import write_manifest
from c2f_ray.tiny.prompts import write_prompts
from c2f_ray.tiny.settings import Settings
from c2f_ray.tiny.tokenizer import policy_tokenizer, reward_tokenizer


def optimizer(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)


def apply_gradient(model: torch.nn.Module, optim: torch.optim.AdamW, loss: torch.Tensor, lr: float) -> None:
    optim.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optim.param_groups:
        group["lr"] = lr
    optim.step()


def train_base(settings: Settings) -> tuple[MistralForCausalLM, list[gates.Gate]]:
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
            print(f"base: step {done}, {right:.1%} of forced derivations right", flush=True)
            if done >= settings.base_min_steps and right >= settings.base_gate:
                break
    pages = settings.base_pages * settings.base_page_tokens // settings.base_cooldown_page_tokens
    for i in range(settings.base_cooldown_steps):
        lr = settings.base_lr * (1 - i / settings.base_cooldown_steps)
        step(lr, pages, settings.base_cooldown_page_tokens, settings.base_cooldown_list_share)
    models.round_to_bfloat16(model)
    right = gates.forced_derivations(model, probe)
    return model, [gates.Gate("base: forced derivations right to the last digit", right, settings.base_gate)]


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
    return model


def train_pair(settings: Settings, base: MistralForCausalLM, folder: Path) -> None:
    """The log-ratio reward's two Mixtrals: the reference knows all styles, the policy prefers right derivations.

    So the ratio is high for what a right derivation that ends has and other responses have not.
    """
    torch.manual_seed(settings.seed)
    rng = random.Random(f"pair {settings.seed}")
    tokenizer = reward_tokenizer()
    model = models.new_mixtral(settings, base)
    for name, steps in (("reference", settings.pair_reference_steps), ("policy", settings.pair_policy_steps)):
        optim = optimizer(model, settings.pair_lr)
        model.train()
        for i in range(steps):
            derived_share = settings.pair_derived_share if name == "policy" else 0.0
            ids, labels = corpus.pair_batch(rng, tokenizer, settings.pair_rows, derived_share, settings.pair_junk_share)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=corpus.IGNORED)
            apply_gradient(model, optim, loss, settings.pair_lr * (1 - i / steps))
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


def train_reward(settings: Settings, base: MistralForCausalLM) -> tuple[models.RewardModel, list[gates.Gate]]:
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
            print(f"reward: step {done}, {told:.1%} of answers one digit apart told apart", flush=True)
            if done >= settings.reward_min_steps and told >= settings.reward_told:
                break
    for i in range(settings.reward_long_steps):
        step(
            settings.reward_lr * (1 - i / settings.reward_long_steps),
            settings.reward_prompts // 2,
            rng.choice((1, 4, 9)),
        )
    models.round_to_bfloat16(model)
    rates = gates.pair_rates(model.eval(), settings.seed)
    mean = rates.pop("mean")
    measured = [gates.Gate("reward: probe pairs ranked rightly, mean of the kinds", mean, settings.reward_mean_gate)]
    for kind, rate in rates.items():
        measured.append(gates.Gate(f"reward: {kind}", rate, settings.reward_worst_gate))
    return model, measured


def train_world(folder: Path, settings: Settings) -> list[gates.Gate]:
    """Trains all models, writes them, their prompts and the manifest into `folder`; returns what the gates measured.

    Each later model starts from the base as it was stored, in bfloat16 values.
    """
    torch.set_num_threads(settings.num_threads)
    torch.use_deterministic_algorithms(True)
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def done(stage: str) -> None:
        nonlocal began
        seconds[stage] = round(time.monotonic() - began, 1)
        print(f"{stage}: {seconds[stage]:.0f} s", flush=True)
        began = time.monotonic()

    write_prompts(folder / "prompts", settings)
    base, measured = train_base(settings)
    models.save_policy(base, folder / "base", with_template=False)
    done("base")
    models.save_policy(
        train_instruct(settings, models.load_policy(folder / "base")), folder / "instruct", with_template=True
    )
    done("instruct")
    reward, reward_gates = train_reward(settings, models.load_policy(folder / "base"))
    models.save_reward(reward, folder / "reward")
    done("reward")
    train_pair(settings, models.load_policy(folder / "base"), folder)
    done("pair")
    measured += reward_gates
    facts = {
        "settings": asdict(settings),
        "machine": f"{platform.machine()}, {_cpu()}, torch kernels {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        "seconds": seconds,
        "gates": [asdict(gate) for gate in measured],
    }
    write_manifest(folder, facts)
    return measured


def _cpu() -> str:
    """Returns the CPU's model name, which decides the last bits of the models."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def main(words: list[str] | None = None, settings: Settings = Settings()) -> None:  # noqa: B008 (it is frozen)
    """Runs the tool with the command line's words; ``settings`` are those that it has no option for."""
    parser = argparse.ArgumentParser(prog="python -m c2f_ray.tiny.train", description="Train the tiny world.")
    parser.add_argument("folder", type=Path, help="A new folder; to ship it, replace c2f_ray/tiny/data by it.")
    parser.add_argument("--seed", type=int, default=settings.seed)
    parser.add_argument("--threads", type=int, default=settings.num_threads)
    arguments = parser.parse_args(words)
    folder: Path = arguments.folder
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    measured = train_world(folder, replace(settings, seed=arguments.seed, num_threads=arguments.threads))
    for gate in measured:
        print(gate)
    missed = [gate for gate in measured if not gate.passed]
    print(f"{folder}: {len(missed)} of {len(measured)} gates missed" + ("; try another --seed" if missed else ""))
    sys.exit(int(bool(missed)))


if __name__ == "__main__":
    main()
