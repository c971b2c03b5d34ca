"""The driver itself: its schedule, its cost at scale, its share of a real step, and the transfer of weights.

    python benchmarks/pipeline.py [schedules] [scale] [heap] [demo] [transfer]

`schedules`, `scale` and `heap` run the real loop, pools and learner group on fake actors, which only wait; `demo` and
`transfer` have the real engines. Parts that are not named keep the numbers of the last run.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import chdir, closing
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import torch
from ray import cloudpickle
from transformers import MistralConfig, MistralForCausalLM

from c2f_ray import load_recipe, train
from c2f_ray.data.trajectory import Ragged
from c2f_ray.recipe import Recipe, Weights
from c2f_ray.recipe.roles import scorers
from c2f_ray.rollout.pool import RolloutPool
from c2f_ray.simulate.fakes import FakeActors, FakeWork
from c2f_ray.simulate.run import run_on_fakes
from c2f_ray.tiny.tokenizer import policy_tokenizer
from c2f_ray.watch.metrics import read_metrics
from c2f_ray.weights.source import ModuleWeights
from c2f_ray.weights.transfer import WeightSender

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.yaml"
RESULTS = Path(__file__).parent / "results" / "pipeline.json"
STEPS = 10
# Seconds of generation and of learning in one step; long-tailed generation differs from step to step.
CASES = {"balanced": (2.0, 2.0), "rollout_heavy": (3.0, 1.0), "long_tailed": (None, 2.0)}
# With their greedy rollouts 65,536 samples a step, in 2,048 shards.
SCALE = ("prompts.per_step=32768", "rollout.shard_samples=32", "learner.ranks=8", "run.steps=5")
LARGE, SMALL = {"rollout.actors": 256, "reward.workers": 64}, {"rollout.actors": 16, "reward.workers": 4}
BUCKET_MIB, REPEATS = 32, 4
TOKENS = (100, 10_000)  # of a response, with the same samples


def on_fakes(work: dict[str, Any], after_step: Callable[[float, dict[str, Any]], None], *overrides: str) -> None:
    recipe = load_recipe(CONFIG, "length={rule: fixed, max_tokens: 96}", "checkpoints.every_steps=1000", *overrides)
    fakes = FakeActors(work=fake_work(recipe, **work), processes=2)
    with tempfile.TemporaryDirectory() as folder, closing(fakes) as actors:
        run_on_fakes(recipe, Path(folder), actors, after_step)


def fake_work(recipe: Recipe, **work: Any) -> FakeWork:
    (scorer,) = scorers(recipe)
    return FakeWork(**{"samples": (0.0,), "scores": [(scorer, 0.0)], "update": 0.0, "transfer": 0.0} | work)


def generation_seconds(case: str, step: int) -> float:
    seconds = CASES[case][0]
    return seconds if seconds is not None else float(np.random.default_rng(step).choice([1.0, 5.0], p=[0.8, 0.2]))


def ideal(case: str) -> float:
    """Seconds of the best schedule for staleness 1: each step's learning beside the next one's generation."""
    rollouts = [generation_seconds(case, step) for step in range(STEPS)]
    learning = CASES[case][1]
    return rollouts[0] + sum(max(learning, rollout) for rollout in rollouts[1:]) + learning


def schedules() -> dict[str, Any]:
    found = {}
    for case in CASES:
        of_actor = 2 * 64 // 4  # samples, with the greedy ones, of each of 4 actors
        work = {
            "samples": tuple(generation_seconds(case, step) / of_actor for step in range(STEPS)),
            "update": CASES[case][1],
        }
        took = {}
        for name, staleness in (("synchronous", 0), ("pipelined", 1)):
            seconds: list[float] = []
            on_fakes(
                work,
                lambda _, metrics, seconds=seconds: seconds.append(metrics["time/step_s"]),
                f"run.steps={STEPS}",
                f"rollout.max_staleness={staleness}",
                "learner.importance_clip=2.0",
                "rollout.actors=4",
                "reward.workers=2",
            )
            took[name] = sum(seconds)
        found[case] = {
            **{f"{name}_s": seconds for name, seconds in took.items()},
            "ideal_s": ideal(case),
            "ideal_over_pipelined": ideal(case) / took["pipelined"],
            "lost_ms_per_step": 1000 * (took["pipelined"] - ideal(case)) / STEPS,
            "synchronous_over_pipelined": took["synchronous"] / took["pipelined"],
        }
    return found


def costs(actors: dict[str, int]) -> dict[str, Any]:
    """Of the driver's process, from the end of a step to that of the next; the first step is not counted."""
    marks: list[tuple[float, float, float]] = []

    def mark(_: float, metrics: dict[str, Any]) -> None:
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        marks.append((time.process_time(), time.thread_time(), rss))

    on_fakes({}, mark, *SCALE, *(f"{key}={count}" for key, count in actors.items()))
    process, thread = ([1e6 * (after[clock] - before[clock]) for before, after in pairwise(marks)] for clock in (0, 1))
    return {
        "process_cpu_us_per_step": statistics.median(process),
        "loop_cpu_us_per_step": statistics.median(thread),
        "rss_mib_after_each_step": [round(rss) for _, _, rss in marks],
    }


def scale() -> dict[str, Any]:
    """The driver's own CPU time: of its loop, and with Ray's threads; and whether its memory grows step by step."""
    samples = 2 * 32768
    large, small = costs(LARGE), costs(SMALL)
    more = sum(LARGE.values()) - sum(SMALL.values())
    kept: list[int] = []
    tracemalloc.start()
    on_fakes(
        {}, lambda *_: kept.append(tracemalloc.get_traced_memory()[0]), *SCALE, *(f"{k}={n}" for k, n in LARGE.items())
    )
    tracemalloc.stop()
    return {
        "samples_per_step": samples,
        **LARGE,
        "loop_cpu_us_per_sample": large["loop_cpu_us_per_step"] / samples,
        "process_cpu_us_per_sample": large["process_cpu_us_per_step"] / samples,
        "loop_cpu_us_per_actor_and_step": (large["loop_cpu_us_per_step"] - small["loop_cpu_us_per_step"]) / more,
        "rss_mib_after_each_step": large["rss_mib_after_each_step"],
        "kept_mib_after_each_step": [round(size / 2**20, 1) for size in kept],
    }


def heap() -> dict[str, Any]:
    """What the driver gets and keeps of the same samples with short and with long responses."""
    found: dict[str, Any] = {}
    settings = (
        "prompts.per_step=1024",
        "rollout.shard_samples=32",
        "run.steps=3",
        "rollout.actors=8",
        "reward.workers=4",
    )
    for tokens in TOKENS:
        got: list[int] = []
        peaks: list[int] = []
        real_get = ray.get

        def get(refs: Any, *args: Any, real_get: Any = real_get, got: list[int] = got, **kwargs: Any) -> Any:
            value = real_get(refs, *args, **kwargs)
            got.append(len(cloudpickle.dumps(value)))
            return value

        def after_step(*_: Any, peaks: list[int] = peaks) -> None:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()

        tracemalloc.start()
        with patch.object(ray, "get", get):
            on_fakes({"response_tokens": tokens}, after_step, *settings)
        tracemalloc.stop()
        found[str(tokens)] = {"bytes_got": sum(got), "peak_heap_bytes": statistics.median(peaks[1:])}
    short, long = (found[str(tokens)] for tokens in TOKENS)
    more = 3 * 2048 * (TOKENS[1] - TOKENS[0])
    return {
        "by_response_tokens": found,
        "bytes_got_per_token": (long["bytes_got"] - short["bytes_got"]) / more,
        "peak_heap_bytes_per_token": (long["peak_heap_bytes"] - short["peak_heap_bytes"]) / (more / 3),
    }


def demo() -> dict[str, Any]:
    """The real engines on the demo's recipe: what of a step is none of generation, scoring, learning and transfer."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        lines = read_metrics(train(load_recipe(CONFIG, "run.steps=8")) / "metrics.jsonl")[1:]
    shares = [(line["time/other_s"] or 0.0) / (line["time/step_s"] or 1.0) for line in lines]
    return {
        "step_s": statistics.median(line["time/step_s"] or 0.0 for line in lines),
        "other_share_of_each_step": [round(share, 5) for share in shares],
        "other_share": statistics.median(shares),
    }


@ray.remote(num_cpus=1)
class Sender:
    """As a learner rank: a module of random weights, and the real sender; or buckets of as many bytes, and no more."""

    def __init__(self, config: MistralConfig) -> None:
        torch.manual_seed(0)
        self.model = MistralForCausalLM(config)

    def connect(self, engines: list[Any]) -> int:
        """Bytes of a transfer."""
        source = ModuleWeights(self.model, torch.float32)
        self.sender = WeightSender(source, Weights(bucket_mib=BUCKET_MIB), gpus_per_actor=0, rank=0)
        self.sender.connect(engines)
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def send(self, version: int) -> float:
        began = time.perf_counter()
        self.sender.send(version)
        return time.perf_counter() - began


@ray.remote(num_cpus=1)
class BarePeer:
    def join(self, address: str, port: int, rank: int) -> None:
        from c2f_ray.weights import gloo  # it imports vllm

        self.begin = gloo._begin_broadcast
        info = gloo.GlooInitInfo(
            master_address=address, master_port=port, rank_offset=0, world_size=3, packed_buffer_size_bytes=0,
            timeout_s=600.0,
        )  # fmt: skip
        self.group = gloo._join(info, rank)

    def broadcast(self, num_bytes: int) -> float:
        """Seconds of all buckets, one after the other; the buffers are there before."""
        size = BUCKET_MIB * 2**20
        buffers = [torch.zeros(min(size, num_bytes - start), dtype=torch.uint8) for start in range(0, num_bytes, size)]
        began = time.perf_counter()
        for buffer in buffers:
            self.begin(self.group, buffer, time.monotonic() + 600, "a bucket")()
        return time.perf_counter() - began


def transfer() -> dict[str, Any]:
    """The real sender and two real engines, from the call to checked weights, beside a bare broadcast to two peers."""
    from vllm.utils.network_utils import get_open_port  # seconds of import

    config = MistralConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=256, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["MistralForCausalLM"]
        config.save_pretrained(folder)
        policy_tokenizer(False).save_pretrained(folder)
        settings = ("rollout.actors=2", "rollout.memory=0.125", f"policy.model={folder}")
        no_prompts = ray.put(Ragged.from_rows([np.zeros(1)], np.int32))
        with closing(RolloutPool(load_recipe(CONFIG, *settings), no_prompts, 64, "dummy")) as pool:
            sender: Any = Sender.remote(config)
            pool.wait_until_ready()
            num_bytes = ray.get(sender.connect.remote(pool.actors))
            real = [ray.get(sender.send.remote(version)) for version in range(REPEATS)]
        ray.kill(sender)
    peers: list[Any] = [BarePeer.remote() for _ in range(3)]
    address, port = ray.util.get_node_ip_address(), get_open_port()
    ray.get([peer.join.remote(address, port, rank) for rank, peer in enumerate(peers)])
    bare = [max(ray.get([peer.broadcast.remote(num_bytes) for peer in peers])) for _ in range(REPEATS)]
    return {
        "bytes": num_bytes,
        "engines": 2,
        "real_s": min(real[1:]),
        "bare_s": min(bare[1:]),
        "real_over_bare_rate": min(bare[1:]) / min(real[1:]),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "schedules": schedules,
    "scale": scale,
    "heap": heap,
    "demo": demo,
    "transfer": transfer,
}


def goals(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    told = []
    for case, figures in found.get("schedules", {}).items():
        share = figures["ideal_over_pipelined"]
        told.append((f"{case}, of the ideal schedule", f"{share:.3f} (>= 0.95)", share >= 0.95))
    if scale := found.get("scale"):
        for clock in ("loop", "process"):
            cost = scale[f"{clock}_cpu_us_per_sample"]
            told.append((f"driver's CPU per sample, {clock}", f"{cost:.1f} us (<= 50)", cost <= 50))
        kept = scale["kept_mib_after_each_step"]
        told.append(("memory flat", f"{kept} MiB", kept[-1] < 1.05 * kept[1] + 1))
    if heap := found.get("heap"):
        got, kept = heap["bytes_got_per_token"], heap["peak_heap_bytes_per_token"]
        told.append(("bytes in the driver per token", f"{got:.4f} got, {kept:.4f} of heap (0)", max(got, kept) < 0.01))
    if demo := found.get("demo"):
        told.append(("driver's share of a step", f"{demo['other_share']:.2%} (<= 2%)", demo["other_share"] <= 0.02))
    if transfer := found.get("transfer"):
        share = transfer["real_over_bare_rate"]
        told.append(("transfer, of a bare broadcast's rate", f"{share:.2f} (>= 0.80)", share >= 0.8))
    return told


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version()}
    os.environ["RAY_ADDRESS"] = "local"
    for name in wanted:
        began = time.monotonic()
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        found[name] = PARTS[name]()
        ray.shutdown()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}, {time.monotonic() - began:.0f} s:", json.dumps(found[name], indent=1), flush=True)
    for what, value, good in goals(found):
        print(f"goal {what}: {value} {'ok' if good else 'missed'}")


if __name__ == "__main__":
    main()
