"""Responses of the evaluated models, from the same rollout actors that training uses."""

from dataclasses import replace
from typing import Any

import numpy as np
import ray
from transformers import AutoConfig

from c2f_ray.data.trajectory import Ragged, Trajectories
from c2f_ray.evaluation.check import Candidate
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.schema import Evaluate
from c2f_ray.rollout.pool import RolloutPool, RolloutRequest


class Server:
    """The engines, which serve all models of one architecture in turn: weights are swapped, not engines."""

    def __init__(self, recipe: Recipe, settings: Evaluate) -> None:
        self.recipe = recipe
        self.settings = settings
        self.engines: RolloutPool | None = None
        self.architecture: dict[str, Any] = {}

    def answer(self, candidate: Candidate) -> list[Any]:
        """References to the shards of the candidate's greedy responses, by row of its prompts."""
        tokens = ray.put(candidate.prompts.tokens)
        architecture = _architecture(candidate.folder)
        if self.engines is not None and architecture == self.architecture:
            self.engines.load_folder(candidate.folder, tokens)
        else:
            self.close()
            policy = self.recipe.policy.model_copy(update={"model": candidate.folder})
            recipe = self.recipe.model_copy(update={"policy": policy})
            max_model_tokens = recipe.prompts.max_tokens + self.settings.max_tokens
            self.engines = RolloutPool(recipe, tokens, max_model_tokens, load_format="auto")
            self.engines.wait_until_ready()
            self.architecture = architecture
        requests = [RolloutRequest(row, row, 0, greedy=True) for row in range(len(candidate.prompts))]
        return [shard for shard, _ in self.engines.generate(requests, self.settings.max_tokens, ordered=True)]

    def close(self) -> None:
        if self.engines is not None:
            self.engines.close()
            self.engines = None


def _architecture(folder: str) -> dict[str, Any]:
    """What an engine was built for: the configuration, but for what only names or describes the model."""
    described = ("_name_or_path", "transformers_version", "dtype", "architectures")
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in described}


@ray.remote(num_cpus=0)
def truncate(shard: Trajectories, limit: int) -> Trajectories:
    """The shard as a response limit of `limit` tokens would have made it, for greedy trajectories."""
    info = shard.info
    return Trajectories(
        replace(
            info,
            finished=info.finished & (info.response_tokens <= limit),
            response_tokens=np.minimum(info.response_tokens, limit),
        ),
        shard.prompt,
        Ragged.from_rows([shard.response[i][:limit] for i in range(len(shard))], np.int32),
        Ragged.from_rows([shard.sampler_logprobs[i][:limit] for i in range(len(shard))], np.float32),
    )
