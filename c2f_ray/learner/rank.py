"""One DeepSpeed rank of the learner: it reads the shards and has the algorithm learn from them.

Invariants: which samples share a micro-batch depends on sample ids and lengths only; every rank runs the same number
of micro-batches; an update that is not finite raises on every rank and names its samples.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import ObjectLostError
from safetensors.torch import load_file, save_file
from torch import distributed

from c2f_ray.data.atomic import sha256, sync
from c2f_ray.data.trajectory import Float32, Int64
from c2f_ray.errors import ActorDiedError, NonFiniteUpdateError, ShardsLostError
from c2f_ray.learner.accumulator import MetricsAccumulator
from c2f_ray.learner.batching import Samples, UpdateBatch, rank_plan
from c2f_ray.learner.export import export
from c2f_ray.learner.finite import name
from c2f_ray.recipe import Recipe
from c2f_ray.runtime.rendezvous import open_store
from c2f_ray.runtime.waiting import wait_for
from c2f_ray.weights.source import ModuleWeights
from c2f_ray.weights.transfer import WeightSender


class LearnerRank:
    """Runs as a Ray actor. Every method from ``start`` on is called on all ranks at the same time."""

    def __init__(self, recipe: Recipe, kind: Callable[[Recipe, int, int], Any], rank: int, total_updates: int) -> None:
        """``kind``: the class of the algorithm, of which every rank has an instance."""
        self.kind = kind
        self.recipe = recipe
        self.learner = recipe.learner
        self.rank = rank
        self.total_updates = total_updates

    def rendezvous(self) -> tuple[str, int]:
        """Opens the store where the ranks meet, on a free port of this node. Returns (address, port)."""
        address = ray.util.get_node_ip_address()
        self.store = open_store(address)
        return address, self.store.port

    def start(self, meeting: tuple[str, int]) -> None:
        """Joins the other ranks, at what rank 0's ``rendezvous`` returned, and loads the models."""
        os.environ["LOCAL_RANK"] = "0"  # Ray shows every actor its own GPU only
        from c2f_ray.learner import engine  # not before: DeepSpeed chooses its accelerator at import

        torch.manual_seed(self.recipe.run.seed)
        # On a GPU a few operations, such as a cumulative sum, have no deterministic form.
        torch.use_deterministic_algorithms(self.recipe.run.deterministic, warn_only=self.learner.gpus_per_rank > 0)
        # Or every backward would write NaN into DeepSpeed's empty 2 GB bucket, which takes seconds.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore
        if self.rank > 0:
            self.store = distributed.TCPStore(*meeting, is_master=False)
        # Only so that no process stays behind for ever: the driver's own deadlines come first.
        timeout_s = max(self.recipe.cluster.start_timeout_s, self.learner.timeout_s)
        engine.join_process_group(self.store, self.rank, self.learner, timeout_s)
        self.algorithm = self.kind(self.recipe, self.rank, self.total_updates)
        self.policy = self.algorithm.policy
        self.device = self.policy.engine.device

    def update(self, shards: list[ObjectRef], batch: UpdateBatch) -> dict[str, float]:
        """Learns from one step's rollouts. Returns the update's metrics, the same on every rank.

        ``shards`` refer to Trajectories; those that the batch does not name are left out. Seconds are those of the
        slowest rank. Raises NonFiniteUpdateError; ValueError when the shards lack a sample of the batch.
        """
        metrics = MetricsAccumulator(self.device)
        with metrics.seconds("time/learner_read_s"):
            samples = self._samples(shards, batch.sample_id)
            batch = _in_order(batch, samples)
        return self.algorithm.update(samples, batch, metrics)

    def _samples(self, shards: list[ObjectRef], only: Int64 | None = None) -> Samples:
        try:
            read = wait_for(shards, self.learner.timeout_s, f"shards of learner rank {self.rank}")
        except (ActorDiedError, ObjectLostError) as error:
            raise ShardsLostError(f"trajectories were lost with a node: {error}") from error
        return Samples(read, packing=self.learner.packs, only=only)

    def connect(self, actors: list[Any]) -> None:
        """Joins the rollout actors, which may be done again with others."""
        self.sender = WeightSender(self._weights(), self.recipe.weights, self.recipe.rollout.gpus_per_actor, self.rank)
        self.sender.connect(actors)

    def _weights(self) -> ModuleWeights:
        lora, dtype = self.learner.lora, getattr(torch, self.recipe.policy.dtype)
        scale = lora.alpha / lora.rank if lora is not None else 0.0
        return ModuleWeights(self.policy.module.model, dtype, self.policy.gather, scale)

    def send_weights(self, version: int) -> None:
        """The rollout actors hold the policy as it is now, as ``version``, when this returns."""
        self.sender.send(version)

    def logprobs(self, shards: list[ObjectRef]) -> dict[int, Float32]:
        """The policy's logprobs of each response token, by sample id, of the samples that fall to this rank."""
        samples = self._samples(shards)
        found: dict[int, Float32] = {}
        for rows, num_chunks in rank_plan(samples, np.arange(len(samples.sample_id)), self.rank, self.learner):
            with torch.no_grad():
                micro = samples.micro_batch(rows).to(self.device)
                values = self.policy.engine(*micro.inputs, num_chunks, **micro.packing)[0]
            parts = np.split(values.cpu().numpy(), np.cumsum(samples.response_tokens[rows])[:-1])
            found |= {int(samples.sample_id[row]): part for row, part in zip(rows, parts, strict=False)}
        return found

    def save(self, folder: Path) -> dict[str, str]:
        """Writes this rank's share of a checkpoint. Returns the SHA-256 hex digests of its files by name."""
        from c2f_ray.learner.checkpoint import save_model, steps_of_adam

        files: list[Path] = []
        for prefix, model in self.algorithm.models.items():
            files += save_model(model, folder, prefix, self.rank)
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        files.append(folder / f"rng-rank{self.rank:05d}.safetensors")
        save_file(states, files[-1])
        if self.rank == 0:
            counts = {
                prefix: {"steps": model.steps, "adam_steps": steps_of_adam(model)}
                for prefix, model in self.algorithm.models.items()
            }
            files.append(folder / "learner.json")
            files[-1].write_text(json.dumps({"models": counts, "algorithm": self.algorithm.state()}, indent=1))
        for path in files:
            sync(path)
        return {path.name: sha256(path) for path in files}

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint, which any number of ranks may have written. Raises CheckpointError."""
        from c2f_ray.learner.checkpoint import load_model

        saved = json.loads((folder / "learner.json").read_text())
        for prefix, model in self.algorithm.models.items():
            counts = saved["models"][prefix]
            load_model(model, folder, prefix, counts["adam_steps"])
            model.steps = counts["steps"]
        self.algorithm.restore(saved["algorithm"])
        rng = folder / f"rng-rank{self.rank:05d}.safetensors"
        if rng.exists():  # a rank that was not there keeps its seed's
            states = load_file(rng)
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and self.device.type == "cuda":
                torch.cuda.set_rng_state(states["cuda"], self.device)

    def export(self, folder: Path, chat_template: str) -> None:
        """Writes the policy as an ordinary Hugging Face folder, one layer at a time in memory.

        Its adapters, where it has some, are merged there, and written by themselves into ``FOLDER_adapter``.
        """
        model, start = self.policy.module.model, self.recipe.policy.model
        if self.learner.lora is not None:
            from c2f_ray.learner.lora import save_adapters

            beside = folder.with_name(folder.name + "_adapter")
            save_adapters(model, self.learner.lora, start, self.policy.gather, beside, write=self.rank == 0)
        if self.rank == 0:
            export(model, self._weights(), start, chat_template, folder)
        else:
            self._weights().take_part()


def _in_order(batch: UpdateBatch, samples: Samples) -> UpdateBatch:
    """The batch with the rows of ``samples``. Raises where it is about others, or has rewards that are not finite."""
    order = np.argsort(batch.sample_id)
    if not np.array_equal(batch.sample_id[order], samples.sample_id):
        raise ValueError(
            f"not in both the shards and their rewards: {name(np.setxor1d(batch.sample_id, samples.sample_id))}"
        )
    reward = batch.reward[order]
    baseline = None if batch.baseline is None else batch.baseline[order]
    finite = np.isfinite(reward if baseline is None else reward - baseline)
    if not finite.all():
        raise NonFiniteUpdateError(f"rewards are not finite: {name(samples.sample_id[~finite])}")
    scale = None if batch.scale is None else batch.scale[order]
    return UpdateBatch(samples.sample_id, reward, baseline, scale)
