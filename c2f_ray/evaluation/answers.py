"""Responses of the evaluated models, from the same rollout actors that training uses."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from transformers import AutoConfig

from c2f_ray.data.model_folder import model_stamp
from c2f_ray.data.prompts import request_seed
from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.evaluation.check import Candidate, EvaluationPlan
from c2f_ray.evaluation.mt_bench import TURNS, save_conversations, second_turn
from c2f_ray.recipe import Evaluate, Recipe
from c2f_ray.rollout.pool import RolloutPool, RolloutRequest

Shards = list[tuple[Any, TrajectoryInfo]]  # references to Trajectories, and what the driver may know of them


class Server:
    """The engines, which serve all models of one architecture in turn: weights are swapped, not engines."""

    def __init__(self, recipe: Recipe, settings: Evaluate) -> None:
        self.recipe = recipe
        self.settings = settings
        self.engines: RolloutPool | None = None
        self.architecture: dict[str, Any] = {}
        turns = 1 if settings.mt_bench is None else TURNS
        self.max_model_tokens = turns * (recipe.prompts.max_tokens + settings.max_tokens)

    def load(self, folder: str, tokens: Any) -> None:
        """Takes a model, and a reference to the Ragged of the prompts that it is going to be asked."""
        architecture = _architecture(folder)
        if self.engines is not None and architecture == self.architecture:
            self.engines.load_folder(folder, tokens)
            return
        self.close()
        policy = self.recipe.policy.model_copy(update={"model": folder})
        recipe = self.recipe.model_copy(update={"policy": policy})
        self.engines = RolloutPool(recipe, tokens, self.max_model_tokens, load_format="auto")
        self.engines.wait_until_ready()
        self.architecture = architecture

    def answer(self, requests: list[RolloutRequest]) -> Shards:
        """The loaded model's responses."""
        assert self.engines is not None
        return list(self.engines.generate(requests, self.settings.max_tokens, ordered=True))

    def close(self) -> None:
        if self.engines is not None:
            self.engines.close()
            self.engines = None


def greedy(rows: range) -> list[RolloutRequest]:
    return [RolloutRequest(row, row, 0, greedy=True) for row in rows]


def answers_path(recipe: Recipe, plan: EvaluationPlan, part: str, candidate: Candidate) -> Path:
    """Where a model's answers to one part of the prompts are kept. The name holds all that they depend on, so that what
    is there need not be asked again: the judge's verdicts on them are worth money.
    """
    prompts = [candidate.prompts.tokens[row].tolist() for row in plan.rows[part]]
    settings = [plan.settings.max_tokens, recipe.policy.dtype]
    if part == "mt_bench":
        assert plan.settings.mt_bench is not None
        rollout = recipe.rollout
        settings += [recipe.run.seed, plan.settings.mt_bench.runs, rollout.temperature, rollout.top_p]
        settings += [plan.asked.records[row]["turns"] for row in plan.rows[part]]
    else:
        settings += [recipe.reward.model_dump()]
    return plan.folder / "evaluation" / part / f"{kept_name(candidate, prompts, settings)}.parquet"


def kept_name(candidate: Candidate, *settings: Any) -> str:
    """The model's name, and a digest of the model and of what else its results depend on."""
    digest = hashlib.sha256(json.dumps([model_stamp(candidate.folder), *settings]).encode()).hexdigest()
    return f"{candidate.name}.{digest[:16]}"


def converse(recipe: Recipe, plan: EvaluationPlan, server: Server, candidate: Candidate, path: Path) -> Any:
    """The loaded model answers both turns of every question in every run; a reference to the task that saves them."""
    settings, rows = plan.settings.mt_bench, plan.rows["mt_bench"]
    assert settings is not None
    asked = [(run, row) for run in range(settings.runs) for row in rows]

    def requests(turn: int) -> list[RolloutRequest]:
        return [
            RolloutRequest(
                sample_id=i,
                prompt_row=row if turn == 1 else i,
                seed=request_seed(recipe.run.seed, f"{plan.asked.ids[row]}/{turn}", run, 0),
                greedy=False,
            )
            for i, (run, row) in enumerate(asked)
        ]

    timeout_s, tokenizer = recipe.rollout.timeout_s, recipe.policy.model
    first = [shard for shard, _ in server.answer(requests(1))]
    room = server.max_model_tokens - plan.settings.max_tokens
    prompts = ray.put(candidate.prompts)
    server.load(candidate.folder, second_turn.remote(tokenizer, candidate.template, prompts, first, room, timeout_s))
    second = [shard for shard, _ in server.answer(requests(2))]
    return save_conversations.remote(path, tokenizer, [first, second], timeout_s)


def _architecture(folder: str) -> dict[str, Any]:
    """What an engine was built for: the configuration, but for what only names or describes the model."""
    described = ("_name_or_path", "transformers_version", "dtype", "architectures")
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in described}


@ray.remote(num_cpus=0)
def truncate(shard: Trajectories, limit: int) -> Trajectories:
    """The shard as a response limit of `limit` tokens would have made it, for greedy trajectories."""
    return Trajectories(
        truncated_info(shard.info, limit),
        shard.prompt,
        Ragged.from_rows([shard.response[i][:limit] for i in range(len(shard))], np.int32),
        Ragged.from_rows([shard.sampler_logprobs[i][:limit] for i in range(len(shard))], np.float32),
        Ragged.from_rows([shard.token_version[i][:limit] for i in range(len(shard))], np.int32),
    )


def truncated_info(info: TrajectoryInfo, limit: int) -> TrajectoryInfo:
    finished = info.finished & (info.response_tokens <= limit)
    return replace(info, finished=finished, response_tokens=np.minimum(info.response_tokens, limit))
