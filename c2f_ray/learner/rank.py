"""One DeepSpeed rank of the learner: it reads the shards and turns one step's rollouts into one policy update.

Invariants: which samples share a micro-batch depends on sample ids and lengths only; every rank runs the same number
of micro-batches; an update that is not finite raises on every rank and names its samples.
"""

import os
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm
from transformers import GenerationConfig

from c2f_ray.algorithms import remax
from c2f_ray.algorithms.logprobs import chunks_for
from c2f_ray.algorithms.schedule import lr_factor
from c2f_ray.data.model_folder import copy_tokenizer
from c2f_ray.data.trajectory import Float32, Int64
from c2f_ray.errors import NonFiniteUpdateError
from c2f_ray.learner.batching import MicroBatch, Samples, UpdateBatch, plan
from c2f_ray.learner.tally import Tally
from c2f_ray.recipe.schema import Recipe, ReMaxLearner
from c2f_ray.waiting import wait_for
from c2f_ray.weights.source import ModuleWeights
from c2f_ray.weights.transfer import WeightSender

NAMED_SAMPLES = 10  # how many samples an error names


class LearnerRank:
    """Runs as a Ray actor. Every method from ``start`` on is called on all ranks at the same time."""

    def __init__(self, recipe: Recipe, rank: int, total_updates: int) -> None:
        assert isinstance(recipe.learner, ReMaxLearner)  # other algorithms are refused before any actor starts
        self.recipe = recipe
        self.learner = recipe.learner
        self.rank = rank
        self.total_updates = total_updates
        self.updates = 0  # done

    def rendezvous(self) -> tuple[str, int]:
        """Opens the store where the ranks meet, on a free port of this node. Returns (address, port)."""
        address = ray.util.get_node_ip_address()
        self.store = distributed.TCPStore(address, 0, is_master=True, wait_for_workers=False)
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
        if self.learner.gpus_per_rank == 0:
            torch.set_num_threads(1)
        if self.rank > 0:
            self.store = distributed.TCPStore(*meeting, is_master=False)
        # Only so that no process stays behind for ever: the driver's own deadlines come first.
        timeout_s = max(self.recipe.cluster.start_timeout_s, self.learner.timeout_s)
        engine.join_process_group(self.store, self.rank, self.learner, timeout_s)
        self.policy = engine.load_policy(self.recipe.policy)
        self.engine = engine.start_engine(self.policy, self.recipe.policy.dtype, self.learner)
        self.device = self.engine.device
        self._whole = engine.gather(self.engine)
        self.reference = None
        if self.learner.kl_coefficient > 0:
            self.reference = engine.load_policy(self.recipe.policy).to(self.device).eval().requires_grad_(False)

    def update(self, shards: list[ObjectRef], batch: UpdateBatch) -> dict[str, float]:
        """One optimizer step on one step's rollouts. Returns the update's metrics, the same on every rank.

        ``shards`` refer to Trajectories; greedy rollouts in them are left out. Seconds are those of the slowest rank.
        Raises NonFiniteUpdateError; ValueError when shards and batch are not about the same samples.
        """
        tally = Tally(self.device)
        with tally.seconds("time/learner_read_s"):
            samples, advantages = self._read(shards, batch)
        num_tokens = int(samples.response_tokens.sum())
        micro_batches = self._plan(samples)
        bad: list[int] = []
        for i, (rows, num_chunks) in enumerate(micro_batches):
            micro = samples.micro_batch(rows).to(self.device)
            self.engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            # learner.algorithm decides here.
            loss, finite = self._remax_loss(micro, num_chunks, advantages[rows].to(self.device), num_tokens, tally)
            with tally.seconds("time/learner_forward_backward_s"):
                self.engine.backward(loss * self.learner.ranks)  # DeepSpeed takes the mean over ranks
            bad += samples.sample_id[rows[~finite.cpu().numpy()]].tolist()
        self._refuse_non_finite(bad)
        lr = self.learner.optimizer.lr * lr_factor(self.learner.optimizer, self.updates, self.total_updates)
        with tally.seconds("time/learner_step_s"):
            grad_norm = self._step(lr)
        self.updates += 1
        if not np.isfinite(grad_norm):
            raise NonFiniteUpdateError(f"the gradient's norm is not finite in the update on {_name(samples.sample_id)}")
        return self._metrics(tally.reduce(), samples) | {"learner/lr": lr, "learner/grad_norm": grad_norm}

    def _read(self, shards: list[ObjectRef], batch: UpdateBatch) -> tuple[Samples, Tensor]:
        samples = Samples(wait_for(shards, self.learner.timeout_s, f"shards of learner rank {self.rank}"))
        order = np.argsort(batch.sample_id)
        if not np.array_equal(batch.sample_id[order], samples.sample_id):
            only_one = np.setxor1d(batch.sample_id, samples.sample_id)
            raise ValueError(f"not in both the shards and their rewards: {_name(only_one)}")
        if not (finite := np.isfinite(batch.reward[order] - batch.baseline[order])).all():
            raise NonFiniteUpdateError(f"rewards are not finite: {_name(samples.sample_id[~finite])}")
        reward, baseline = torch.from_numpy(batch.reward[order]), torch.from_numpy(batch.baseline[order])
        return samples, remax.advantage(reward, baseline, self.learner.reward_clip)

    def _plan(self, samples: Samples) -> list[tuple[Int64, int]]:
        """This rank's micro-batches: (rows, chunks of the output layer, as many as the rank with most needs)."""
        ranks = plan(samples.lengths, self.learner.ranks, self.learner.tokens_per_microbatch)
        most = [max(samples.response_tokens[rows].sum() for rows in together) for together in zip(*ranks, strict=True)]
        return [(rows, chunks_for(int(tokens))) for rows, tokens in zip(ranks[self.rank], most, strict=True)]

    def _remax_loss(
        self, micro: MicroBatch, num_chunks: int, advantages: Tensor, num_tokens: int, tally: Tally
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the update's loss, a scalar, and which of its rows are finite, bool [B].

        The returns' KL term uses the logprobs of the same forward: there is one update per rollout, so the weights
        are the rollout's. The sampler's own logprobs are compared, never used.
        """
        learner = self.learner
        with tally.seconds("time/learner_reference_s"), torch.no_grad():
            reference = self.reference(*micro.inputs, num_chunks)[0] if self.reference is not None else None
        with tally.seconds("time/learner_forward_backward_s"):
            logprobs, entropy = self.engine(*micro.inputs, num_chunks)
        at_rollout = logprobs.detach()
        kl = torch.zeros_like(at_rollout) if reference is None else at_rollout - reference
        returns = remax.returns(
            advantages, micro.unflatten(kl), micro.mask, learner.kl_penalty, learner.kl_coefficient, learner.gamma
        )
        loss = remax.loss(returns, micro.unflatten(logprobs), micro.mask, num_tokens)
        gap = (at_rollout - micro.sampler_logprobs).abs()
        tally.add(loss=loss.detach(), kl=kl, returns=returns, entropy=entropy, gap=gap, padded=micro.input_ids.numel())
        tally.peak("gap_max", gap)
        return loss, (returns * micro.unflatten(at_rollout)).isfinite().all(-1)

    def _refuse_non_finite(self, sample_ids: list[int]) -> None:
        """Every rank raises the same error, so that none waits in a collective for one that has raised."""
        everywhere: list[list[int]] = [[] for _ in range(self.learner.ranks)]
        distributed.all_gather_object(everywhere, sample_ids)
        if any(everywhere):
            found = np.array(sorted(chain(*everywhere)))
            raise NonFiniteUpdateError(f"the logprobs of the policy or of its reference are not finite: {_name(found)}")

    def _step(self, lr: float) -> float:
        """The optimizer's step, left out when the gradient is not finite. Returns its norm before clipping."""
        assert self.engine.optimizer is not None
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.learner.zero_stage == 0 and self.recipe.policy.dtype == "float32":  # where DeepSpeed does not tell it
            norm = get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
            self.engine.step()
            return float(norm)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        assert norm is not None
        return float(norm)

    def _metrics(self, totals: dict[str, float], samples: Samples) -> dict[str, float]:
        tokens, responses = float(samples.response_tokens.sum()), len(samples.sample_id)
        metrics = {
            "learner/loss": totals["loss"],
            "learner/return_mean": totals["returns"] / tokens,
            "learner/entropy": totals["entropy"] / tokens,  # nats, of the distribution before temperature and top_p
            "learner/tokens": tokens,  # response tokens
            "learner/response_tokens_mean": tokens / responses,
            "learner/padding_waste": 1.0 - float(samples.lengths.sum()) / totals["padded"],  # of the tokens computed
            "logprob_gap/mean": totals["gap"] / tokens,  # |learner - sampler|
            "logprob_gap/max": totals["gap_max"],
        }
        if self.reference is not None:
            metrics["kl/sequence"] = totals["kl"] / responses  # nats, summed over a response's tokens
            metrics["kl/token"] = totals["kl"] / tokens
        return metrics | {name: value for name, value in totals.items() if name.startswith("time/")}

    def connect(self, actors: list[Any]) -> None:
        """Joins the rollout actors, which may be done again with others."""
        source = ModuleWeights(self.policy.model, getattr(torch, self.recipe.policy.dtype), self._whole)
        self.sender = WeightSender(source, self.recipe.weights, self.recipe.rollout.gpus_per_actor, self.rank)
        self.sender.connect(actors)

    def send_weights(self, version: int) -> None:
        """The rollout actors hold the policy as it is now, as ``version``, when this returns."""
        self.sender.send(version)

    def logprobs(self, shards: list[ObjectRef]) -> dict[int, Float32]:
        """The policy's logprobs of each response token, by sample id, of the samples that fall to this rank."""
        samples = Samples(wait_for(shards, self.learner.timeout_s, f"shards of learner rank {self.rank}"))
        found: dict[int, Float32] = {}
        for rows, num_chunks in self._plan(samples):
            with torch.no_grad():
                values = self.engine(*samples.micro_batch(rows).to(self.device).inputs, num_chunks)[0].cpu().numpy()
            parts = np.split(values, np.cumsum(samples.response_tokens[rows])[:-1])
            found |= {int(samples.sample_id[row]): part for row, part in zip(rows, parts, strict=False)}
        return found

    def export(self, folder: Path, chat_template: str) -> None:
        """Writes the policy as an ordinary Hugging Face folder, aside first; what was at ``folder`` is replaced.

        ``chat_template`` is the one that it was trained with.
        """
        with self._whole(list(self.policy.parameters())):
            if self.rank == 0:
                partial = folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                # Some published sampling settings cannot be saved again; the policy's own file is copied instead.
                self.policy.model.generation_config = GenerationConfig.from_model_config(self.policy.model.config)
                self.policy.model.save_pretrained(partial)
                copy_tokenizer(self.recipe.policy.model, partial)
                (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)


def _name(sample_ids: Int64) -> str:
    more = len(sample_ids) - NAMED_SAMPLES
    return f"samples {sample_ids[:NAMED_SAMPLES].tolist()}" + (f" and {more} more" if more > 0 else "")
