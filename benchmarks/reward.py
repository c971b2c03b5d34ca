"""Reward workers: batches by token budget against one at a time and against naive padded batches; what scores a log
ratio faster; how many scores are ready when the last rollout ends.

    python benchmarks/reward.py

Random models of the demo's size, on the CPU, on log-normal lengths; all sides in one run, in turn.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from c2f_ray.adapters.vllm import engine_env
from c2f_ray.recipe import LogRatioReward, UltraRMReward
from c2f_ray.reward.batching import Batcher
from c2f_ray.reward.log_ratio import LogprobScorer
from c2f_ray.reward.samples import Encoded
from c2f_ray.reward.ultrarm import UltraRM, UltraRMScorer
from c2f_ray.tiny.tokenizer import reward_tokenizer

RESULTS = Path(__file__).parent / "results" / "reward.json"
VOCABULARY, MAX_TOKENS, BUDGET = 35, 256, 4096
# The demo's reward model.
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
NAIVE_ROWS = 16  # in a padded batch, in order of arrival
REPEATS = 3
GOALS = {"one_at_a_time": 5.0, "naive_batch": 1.5}


def conversations(count: int, seed: int) -> list[Encoded]:
    """Log-normal lengths between 16 and 256 tokens; the first eight are the prompt's."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.0, 0.8, count), 16, MAX_TOKENS).astype(int)
    return [Encoded(rng.integers(3, VOCABULARY, length).tolist(), 8) for length in lengths]


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def by_budget(score: Callable[[list[Encoded]], list[float]], rows: list[Encoded]) -> list[float | str]:
    """As a worker does, with all shards waiting."""
    return Batcher(score, BUDGET, max_wait_s=0.0, across_calls=True).score(rows)


def in_turn(sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each side, the sides in turn, after one run of each that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name, run in sides.items():
            took = seconds(run)
            if repeat:
                found[name].append(took)
    return found


def ultrarm(folder: Path) -> dict[str, list[float]]:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.save_pretrained(folder)
    save_file(UltraRM(config).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    reward_tokenizer().save_pretrained(folder)
    scorer = UltraRMScorer(
        UltraRMReward(kind="ultrarm", model=str(folder), gpus_per_worker=0, dtype="float32", max_tokens=MAX_TOKENS)
    )
    rows = conversations(512, seed=1)
    arrival = [rows[start : start + NAIVE_ROWS] for start in range(0, len(rows), NAIVE_ROWS)]
    return in_turn({
        "ours": lambda: by_budget(scorer.score, rows),
        "one_at_a_time": lambda: [scorer.score([row]) for row in rows],
        "naive_batch": lambda: [scorer.score(batch) for batch in arrival],
    })  # fmt: skip


def log_ratio(folder: Path) -> dict[str, list[float]]:
    """One of a Mixtral pair: prompt logprobs of vLLM against a plain forward of transformers, in the same batches."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer = reward_tokenizer()
    tokenizer.save_pretrained(folder)
    scorer = LogprobScorer(
        LogRatioReward(
            kind="log_ratio", policy_model=str(folder), reference_model=str(folder), gpus_per_worker=0,
            dtype="float32", max_tokens=MAX_TOKENS, tokens_per_batch=BUDGET, memory=0.5,
        ),
        str(folder),
    )  # fmt: skip
    plain = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = conversations(256, seed=2)

    @torch.inference_mode()
    def forward(batch: list[Encoded]) -> list[float]:
        longest = max(len(row.ids) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for i, row in enumerate(batch):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
        logprobs = plain(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        return [picked[i, row.response_start - 1 : len(row.ids) - 1].sum().item() for i, row in enumerate(batch)]

    ours, theirs = by_budget(scorer.score, rows), by_budget(forward, rows)
    assert np.allclose(ours, theirs, rtol=1e-4), "both must give the same scores"
    return in_turn({
        "vllm": lambda: by_budget(scorer.score, rows),
        "plain_forward": lambda: by_budget(forward, rows),
        "vllm_one_at_a_time": lambda: [scorer.score([row]) for row in rows],
    })  # fmt: skip


def summary(times: list[float]) -> dict[str, float]:
    return {"min": min(times), "median": statistics.median(times), "max": max(times)}


def main() -> None:
    os.environ.update(engine_env(gpus=0))
    with tempfile.TemporaryDirectory() as folder:
        scored, ratio = ultrarm(Path(folder) / "ultrarm"), log_ratio(Path(folder) / "mixtral")

    def against(times: dict[str, list[float]], ours: str, other: str) -> dict[str, float]:
        return summary([b / a for a, b in zip(times[ours], times[other], strict=True)])

    found = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "ultrarm_seconds": {name: summary(times) for name, times in scored.items()},
        "ultrarm_speed_over": {name: against(scored, "ours", name) for name in GOALS},
        "log_ratio_seconds": {name: summary(times) for name, times in ratio.items()},
        "vllm_speed_over_plain_forward": against(ratio, "vllm", "plain_forward"),
        "vllm_speed_over_one_at_a_time": against(ratio, "vllm", "vllm_one_at_a_time"),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    for name, goal in GOALS.items():
        measured = found["ultrarm_speed_over"][name]["median"]
        print(f"goal {name}: {measured:.2f} (>= {goal}) {'ok' if measured >= goal else 'missed'}")


if __name__ == "__main__":
    main()
