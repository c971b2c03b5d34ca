"""What `c2f-ray plan` says of a learner rank's memory, against what the rank allocates: `python benchmarks/memory.py`.

Two real DeepSpeed ranks make two updates of a model of 36 million random weights. All tensors that live between the two
are counted, and every allocation and release of torch's in the second is recorded: bytes at rest, and the most at any
moment. On the CPU, where offloaded state counts with the rest.
"""

import gc
import json
import os
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from learner import PROMPT_TOKENS, SMALL, recipe, rollouts, save_model, update_batch
from torch.profiler import ProfilerActivity, profile

from c2f_ray.algorithms.registry import algorithm_of
from c2f_ray.learner.rank import LearnerRank
from c2f_ray.plan.memory import learner_memory
from c2f_ray.plan.model import read_model
from c2f_ray.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
PACKAGES = ("deepspeed", "ray", "torch", "transformers")
SAMPLES, RESPONSE_TOKENS = 24, 136  # of 160 tokens with their prompts: three micro-batches of 640 on each rank
BUCKET = 2_500_000  # of 36 million parameters; DeepSpeed's 5e8 are as much of a 7B model
BUCKETS = {"zero_optimization": {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}}
BUCKETS_3 = {"zero_optimization": {"reduce_bucket_size": BUCKET, "stage3_max_live_parameters": 5_000_000,
             "stage3_prefetch_bucket_size": 500_000, "stage3_max_reuse_distance": 5_000_000}}  # fmt: skip
COMMON = {"ranks": 2, "tokens_per_microbatch": 640, "packing": True, "timeout_s": 600}
LORA = {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}

CASES: dict[str, dict[str, Any]] = {
    "remax_bf16_zero1": {"zero_stage": 1},
    "remax_bf16_zero2": {},
    "remax_bf16_zero2_checkpointing": {"gradient_checkpointing": True},
    "remax_bf16_zero2_offload": {"offload": "optimizer", "gradient_checkpointing": True},
    "remax_bf16_zero3": {"zero_stage": 3},
    "remax_bf16_zero3_checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
    "remax_bf16_zero3_offload_all": {"zero_stage": 3, "offload": "all", "gradient_checkpointing": True},
    "remax_bf16_lora": {"lora": LORA, "gradient_checkpointing": True},
    "remax_fp32_zero0": {"zero_stage": 0},
    "remax_fp32_zero2": {},
    "remax_fp32_zero3": {"zero_stage": 3},
    "ppo_bf16_zero2_checkpointing": {"gradient_checkpointing": True, "minibatches": 1},
    "ppo_bf16_zero3_checkpointing": {"zero_stage": 3, "gradient_checkpointing": True, "minibatches": 1},
    "ppo_bf16_zero3_offload": {
        "zero_stage": 3, "offload": "optimizer", "gradient_checkpointing": True, "minibatches": 1,
    },
}  # fmt: skip


def case_recipe(name: str, model: str) -> Recipe:
    algorithm, dtype, *_ = name.split("_")
    settings = COMMON | CASES[name]
    settings["deepspeed"] = BUCKETS_3 if settings.get("zero_stage") == 3 else BUCKETS
    found = recipe(model, algorithm, reference=True, **settings)
    dtypes = {"bf16": "bfloat16", "fp32": "float32"}
    return found.model_copy(
        update={
            "policy": found.policy.model_copy(update={"dtype": dtypes[dtype]}),
            "prompts": found.prompts.model_copy(update={"max_tokens": PROMPT_TOKENS}),
            "length": found.length.model_copy(update={"max_tokens": RESPONSE_TOKENS}),
        }
    )


def held(_rank: LearnerRank) -> int:
    """Bytes of all tensors that live now, each storage once."""
    gc.collect()
    storages = [found.untyped_storage() for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def start_recording(rank: LearnerRank) -> None:
    rank.recording = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    rank.recording.start()


def most_allocated(rank: LearnerRank) -> int:
    """Bytes above those at the start of the recording."""
    rank.recording.stop()
    events = rank.recording.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


def measure(recipe: Recipe) -> dict[str, int]:
    actor = ray.remote(LearnerRank).options(
        num_cpus=1, runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}
    )
    ranks: list[Any] = [
        actor.remote(recipe, algorithm_of(recipe.learner), rank, 2) for rank in range(recipe.learner.ranks)
    ]
    meeting = ranks[0].rendezvous.remote()
    ray.get([rank.start.remote(meeting) for rank in ranks])
    lengths = np.full(SAMPLES, RESPONSE_TOKENS)
    shards = [ray.put(rollouts(np.full(SAMPLES, PROMPT_TOKENS), lengths, seed=0))]
    batch = update_batch(SAMPLES, seed=0)
    ray.get([rank.update.remote(shards, batch) for rank in ranks])
    rest = ray.get(ranks[0].__ray_call__.remote(held))
    ray.get(ranks[0].__ray_call__.remote(start_recording))
    ray.get([rank.update.remote(shards, batch) for rank in ranks])
    peak = rest + ray.get(ranks[0].__ray_call__.remote(most_allocated))
    for rank in ranks:
        ray.kill(rank)
    return {"rest": rest, "peak": peak}


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    cases: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder), SMALL, torch.float32, "cpu")
        shape = read_model("policy.model", model)
        for name in CASES:
            chosen = case_recipe(name, model)
            planned = learner_memory(chosen, shape, shape if name.startswith("ppo") else None)
            measured = measure(chosen)
            cases[name] = {
                "dtype": chosen.policy.dtype,
                "learner": chosen.learner.model_dump(mode="json", exclude_defaults=True),
                **measured,
                "planned": round(planned.total + sum(planned.host.values())),
            }
            print(f"{name}: {measured['peak'] / 1e6:.1f} MB, planned {cases[name]['planned'] / 1e6:.1f}", flush=True)
    ray.shutdown()
    result = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {package: version(package) for package in PACKAGES},
        "shape": asdict(shape),
        "prompt_tokens": PROMPT_TOKENS,
        "response_tokens": RESPONSE_TOKENS,
        "cases": cases,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    worst = max(abs(case["planned"] / case["peak"] - 1) for case in cases.values())
    print(f"goal plan_memory_error: {worst:.3f} (<= 0.15) {'ok' if worst <= 0.15 else 'missed'}")


if __name__ == "__main__":
    main()
