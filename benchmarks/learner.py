"""ReMax's update against PPO's on real DeepSpeed ranks, GAE, and batching: `python benchmarks/learner.py`, 5 minutes.

Both algorithms learn from the same rollouts with the same model of random weights, update by update in turns, and the
two updates of a turn are compared. Where torch sees a GPU, a model of Mistral-7B's shape is trained on it as well.
The memory of a training state is a rank's largest resident set in an update, above that of a rank whose model has a
thousand parameters: weights, gradients, optimizer and activations. It is compared without a reference policy, which is
frozen and the same for both algorithms; seconds are compared with one, as the recipes have it.
"""

import ctypes
import gc
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from c2f_ray.algorithms.registry import algorithm_of
from c2f_ray.data.trajectory import Int64, Ragged, Trajectories, TrajectoryInfo
from c2f_ray.learner.batching import Samples, UpdateBatch, rank_plan
from c2f_ray.learner.group import LearnerGroup
from c2f_ray.learner.rank import LearnerRank
from c2f_ray.losses import gae
from c2f_ray.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "learner.json"
PACKAGES = ("ray", "torch", "deepspeed", "transformers")
TURNS = 4
SAMPLES, PROMPT_TOKENS = 16, 24
TOKEN_IDS = (3, 64)  # of all texts, so that a model of next to nothing reads them too
SMALL = MistralConfig(  # 36 million parameters
    vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, sliding_window=None,
)  # fmt: skip
# DeepSpeed's buckets of 5e8 elements are a fourteenth of a 7B model, and would be all of this one.
BUCKET = 2_500_000
LEARNER = {
    "ranks": 2,
    "gradient_checkpointing": True,
    "tokens_per_microbatch": 384,
    "timeout_s": 300,
    "deepspeed": {"zero_optimization": {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}},
}
NEXT_TO_NOTHING = MistralConfig(
    vocab_size=TOKEN_IDS[1], hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, sliding_window=None,
)  # fmt: skip
MISTRAL_7B = MistralConfig(sliding_window=None)
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bfloat16, from the data sheets

Figure = dict[str, float]


def figure(values: list[float]) -> Figure:
    return {"min": min(values), "median": median(values), "max": max(values)}


def save_model(folder: Path, config: MistralConfig, dtype: torch.dtype, device: str) -> str:
    torch.manual_seed(0)
    with torch.device(device):
        MistralForCausalLM(config).to(dtype).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(TOKEN_IDS[1])}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


def recipe(model: str, algorithm: str, *, reference: bool, gpus: int = 0, **learner: Any) -> Recipe:
    """Both algorithms' defaults, but for what is given."""
    optimizer = {"lr": 1e-6}
    critic = {"critic": {"model": "policy", "optimizer": optimizer}} if algorithm == "ppo" else {}
    kl = {"kl_coefficient": 0.1 if reference else 0.0}
    return Recipe.model_validate(
        {
            "run": {"name": "benchmark", "steps": 1000},
            "policy": {"model": model, "dtype": "bfloat16" if gpus else "float32"},
            "prompts": {"source": "prompts.jsonl"},
            "length": {"rule": "fixed", "max_tokens": 2048},
            "rollout": {"gpus_per_actor": gpus},
            "weights": {"timeout_s": 300},
            "reward": {"kind": "function", "function": "rewards:score"},
            "learner": {"algorithm": algorithm, "gpus_per_rank": gpus, "optimizer": optimizer} | critic | kl | learner,
        }
    )


def long_tailed(num: int, middle: float, least: int, most: int, seed: int) -> Int64:
    """Lengths in tokens, log-normal with median ``middle`` and sigma 1."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(middle), 1.0, num))
    return lengths.round().clip(least, most).astype(np.int64)


def rollouts(prompt_tokens: Int64, response_tokens: Int64, seed: int) -> Trajectories:
    rng = np.random.default_rng(seed)
    num = len(response_tokens)
    prompts, responses = (
        Ragged.from_rows([rng.integers(*TOKEN_IDS, n) for n in lengths], np.int32)
        for lengths in (prompt_tokens, response_tokens)
    )
    info = TrajectoryInfo(
        sample_id=np.arange(num),
        prompt_row=np.arange(num),
        greedy=np.zeros(num, bool),
        finished=np.ones(num, bool),
        interrupted=np.zeros(num, bool),
        prompt_tokens=prompt_tokens.astype(np.int32),
        response_tokens=response_tokens.astype(np.int32),
        weight_version=np.zeros(num, np.int32),
    )
    logprobs = Ragged(np.zeros(len(responses.values), np.float32), responses.offsets)
    return Trajectories(info, prompts, responses, logprobs, responses)


def update_batch(num: int, seed: int) -> UpdateBatch:
    reward, baseline = np.random.default_rng(seed).normal(size=(2, num)).astype(np.float32)
    return UpdateBatch(np.arange(num), reward, baseline)


@contextmanager
def learner(recipe: Recipe) -> Iterator[LearnerGroup]:
    group = LearnerGroup(recipe, algorithm_of(recipe.learner), total_updates=1000)
    group.wait_until_ready()
    yield group
    group.close()


def forget_peak(_rank: LearnerRank) -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or free memory that was kept would hide a rise
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(_rank: LearnerRank) -> int:
    """The most memory resident since ``forget_peak``."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def on_ranks(group: LearnerGroup, function: Callable) -> list:
    return ray.get([rank.__ray_call__.remote(function) for rank in group.ranks])


class Learning:
    """A learner and the updates that it made from one step's rollouts, which it gets again and again."""

    def __init__(self, group: LearnerGroup, shards: list, batch: UpdateBatch) -> None:
        self.group, self.shards, self.batch = group, shards, batch
        self.seconds: list[float] = []
        self.peaks: list[float] = []  # bytes, of the rank with most
        self.metrics: list[dict[str, float]] = []

    def update(self) -> None:
        on_ranks(self.group, forget_peak)
        began = time.perf_counter()
        self.metrics.append(self.group.update(self.shards, self.batch))
        self.seconds.append(time.perf_counter() - began)
        self.peaks.append(max(on_ranks(self.group, peak_bytes)))


def in_turns(model: str, turns: int, *, reference: bool) -> tuple[Learning, Learning]:
    """ReMax and PPO, each after one update that nobody counts."""
    responses = long_tailed(SAMPLES, 48, 16, 128, seed=0)
    shards = [ray.put(rollouts(np.full(SAMPLES, PROMPT_TOKENS), responses, seed=0))]
    batch = update_batch(SAMPLES, seed=0)
    with (
        learner(recipe(model, "remax", reference=reference, **LEARNER)) as remax,
        learner(recipe(model, "ppo", reference=reference, **LEARNER)) as ppo,
    ):
        pair = Learning(remax, shards, batch), Learning(ppo, shards, batch)
        for turn in range(turns + 1):
            for learning in pair:
                learning.update()
                if turn == 0:
                    learning.seconds, learning.peaks, learning.metrics = [], [], []
    return pair


def updates(folder: Path) -> dict[str, Figure]:
    """ReMax and PPO: seconds of an update and of its parts, and the memory of the training state."""
    found: dict[str, Figure] = {}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    small = save_model(folder / "small", SMALL, torch.float32, "cpu")
    nothing = save_model(folder / "nothing", NEXT_TO_NOTHING, torch.float32, "cpu")
    floors = [median(learning.peaks) for learning in in_turns(nothing, 1, reference=True)]
    for name, reference, turns in (("", True, TURNS), ("_without_reference", False, 2)):
        pair = in_turns(small, turns, reference=reference)
        states = [[peak - floor for peak in each.peaks] for each, floor in zip(pair, floors, strict=True)]
        for algorithm, each, state in zip(("remax", "ppo"), pair, states, strict=True):
            found[f"{algorithm}_update_seconds{name}"] = figure(each.seconds)
            found[f"{algorithm}_state_mib{name}"] = figure([size / 2**20 for size in state])
            for part in sorted(key for key in each.metrics[0] if key.startswith("time/")):
                found[f"{algorithm}_{part}{name}"] = figure([metrics[part] for metrics in each.metrics])
        ratios = [ours / theirs for ours, theirs in zip(pair[0].seconds, pair[1].seconds, strict=True)]
        found[f"remax_over_ppo_seconds{name}"] = figure(ratios)
        found[f"remax_over_ppo_state{name}"] = figure([a / b for a, b in zip(*states, strict=True)])
    ray.shutdown()
    return found


def gae_milliseconds() -> dict[str, Figure]:
    """Of 8 responses of 32,768 tokens on one core, and the loop over tokens that says the same."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 8, 32768)
    arguments = rewards, values, torch.ones(8, 32768, dtype=torch.bool), 0.99, 0.95
    expected = loop_over_tokens(*arguments)
    torch.testing.assert_close(gae.advantages(*arguments), expected, rtol=1e-4, atol=1e-4)
    blocks = [milliseconds(gae.advantages, *arguments) for _ in range(40)]
    loop = [milliseconds(loop_over_tokens, *arguments) for _ in range(3)]
    return {"gae_ms": figure(blocks), "gae_loop_ms": figure(loop)}


def milliseconds(function: Callable, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - began) * 1000


def loop_over_tokens(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Of responses as long as the tensors: ``mask`` is not looked at."""
    found, following, after = torch.zeros_like(values), torch.zeros(len(values)), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        following = rewards[:, t] + gamma * after - values[:, t] + gamma * gae_lambda * following
        found[:, t], after = following, values[:, t]
    return found


def batching() -> dict[str, Figure]:
    """512 samples over 8 ranks in micro-batches of 16,384 tokens, ten times: packed as on GPUs, padded as on CPUs.

    Balance is the tokens that all ranks wait for, the largest of each round of micro-batches, over their even share.
    """
    return batching_of(packing=True, name="") | batching_of(packing=False, name="_padded")


def batching_of(*, packing: bool, name: str) -> dict[str, Figure]:
    waste, imbalance = [], []
    for seed in range(10):
        lengths = long_tailed(512, 256, 16, 2048, seed)
        samples = Samples([rollouts(lengths // 2, lengths - lengths // 2, seed)], packing=packing)
        settings, everything = recipe("none", "remax", reference=False, ranks=8).learner, np.arange(512)
        computed = np.array(
            [
                [
                    samples.micro_batch(rows).input_ids.numel()
                    for rows, _ in rank_plan(samples, everything, rank, settings)
                ]
                for rank in range(settings.ranks)
            ]
        )  # [rank, micro-batch]
        waste.append(float(1 - lengths.sum() / computed.sum()))
        imbalance.append(float(computed.max(0).sum() / (computed.sum() / 8) - 1))
    return {f"padding_waste{name}": figure(waste), f"microbatch_imbalance{name}": figure(imbalance)}


def on_gpu(folder: Path) -> dict[str, Figure]:
    """ReMax's update of a model of Mistral-7B's shape on one GPU, with a reference: tokens and the share of its FLOPs.

    Model FLOPs: 6 for each parameter and token of policy, 2 of the reference (gradient checkpointing's are not
    counted), and 12 and 4 for each layer, hidden unit and half of the token pairs (arXiv 2204.02311, appendix B).
    """
    memory = torch.cuda.get_device_properties(0).total_memory
    model = save_model(folder / "7b", MISTRAL_7B, torch.bfloat16, "cuda")
    gc.collect()
    torch.cuda.empty_cache()
    # Weights, gradients, AdamW's float32 copy and moments take 16 bytes a parameter, the reference 2.
    offload = "none" if memory > 160e9 else "optimizer"
    lengths = np.full(32, 1024)
    ray.init(num_gpus=1, include_dashboard=False, log_to_driver=False)
    settings = {"gradient_checkpointing": True, "offload": offload}
    with learner(recipe(model, "remax", reference=True, gpus=1, **settings)) as group:
        learning = Learning(group, [ray.put(rollouts(lengths, lengths, seed=0))], update_batch(32, seed=0))
        for _ in range(4):
            learning.update()
    ray.shutdown()
    num_tokens = 32 * 2048
    parameters = 7.24e9 - MISTRAL_7B.vocab_size * MISTRAL_7B.hidden_size  # the embedding multiplies nothing
    pairs = 2048 / 2 * MISTRAL_7B.num_hidden_layers * MISTRAL_7B.hidden_size
    flops = num_tokens * (8 * parameters + 16 * pairs)
    passes = [m["time/learner_forward_backward_s"] + m["time/learner_reference_s"] for m in learning.metrics[1:]]
    name = torch.cuda.get_device_name(0)
    peak = next((flop for key, flop in PEAK_FLOPS.items() if key in name), None)
    found = {
        "gpu_tokens_per_second": figure([num_tokens / seconds for seconds in learning.seconds[1:]]),
        "gpu_tokens_per_second_passes": figure([num_tokens / seconds for seconds in passes]),
    }
    if peak is not None:
        found["gpu_mfu"] = figure([flops / seconds / peak for seconds in learning.seconds[1:]])
        found["gpu_mfu_passes"] = figure([flops / seconds / peak for seconds in passes])
    return found


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    began = time.perf_counter()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    figures = gae_milliseconds() | batching()
    with tempfile.TemporaryDirectory() as folder:
        figures |= updates(Path(folder))
        if gpu:
            figures |= on_gpu(Path(folder))
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "gpu": gpu or "none at hand: tokens/s and MFU of a 7B model are not measured",
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": round(time.perf_counter() - began, 1),
        "figures": {name: {k: float(f"{v:.4g}") for k, v in each.items()} for name, each in figures.items()},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, each in figures.items():
        print(f"{name}: {each['median']:.4g} ({each['min']:.4g} to {each['max']:.4g})")
    print(f"GPU: {result['gpu']}")
    goals = {
        "remax_over_ppo_seconds": 0.62,
        "remax_over_ppo_state_without_reference": 0.55,
        "gae_ms": 2,
        "padding_waste": 0.03,
        "microbatch_imbalance": 0.03,
    }
    for name, goal in goals.items():
        measured = figures[name]["median"]
        print(f"goal {name}: {measured:.3g} (<= {goal}) {'ok' if measured <= goal else 'missed'}")


if __name__ == "__main__":
    main()
