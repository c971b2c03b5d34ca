"""One way into Ray: the session that there is, the cluster that the environment names, or a new local one."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from c2f_ray.errors import RecipeError
from c2f_ray.preflight import check_resources
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.schema import FunctionReward

SPARE_CPUS = 2  # for tasks: merging, and writing trajectories


def train_needs(recipe: Recipe) -> dict[str, float]:
    """What the actors of `train` reserve, by Ray resource name. An actor without a GPU takes a CPU."""
    return _needs([*_inference(recipe), (recipe.learner.ranks, recipe.learner.gpus_per_rank)])


def evaluate_needs(recipe: Recipe) -> dict[str, float]:
    return _needs(_inference(recipe))


def _inference(recipe: Recipe) -> list[tuple[int, int]]:
    rollout, reward = recipe.rollout, recipe.reward
    gpus = 0 if isinstance(reward, FunctionReward) else reward.gpus_per_worker
    return [(rollout.actors, rollout.gpus_per_actor), (reward.workers, gpus)]


def _needs(groups: list[tuple[int, int]]) -> dict[str, float]:
    return {
        "GPU": float(sum(count * gpus for count, gpus in groups)),
        "CPU": float(sum(count for count, gpus in groups if gpus == 0)),
    }


@contextmanager
def ray_session(needs: dict[str, float]) -> Iterator[None]:
    """Joins or starts Ray, refuses `needs` that it cannot meet, and ends what it started."""
    started = not ray.is_initialized()
    if started:
        _connect(cpus=max(os.cpu_count() or 1, int(needs["CPU"]) + SPARE_CPUS))
    try:
        check_resources(needs, ray.cluster_resources())
        yield
    finally:
        if started:
            ray.shutdown()


def _connect(cpus: int) -> None:
    """The cluster of RAY_ADDRESS or of this node; where there is none (or RAY_ADDRESS=local), a new one.

    A new one offers as many CPUs as the actors reserve: on a laptop they share the cores.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address != "local":
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
            return
        except ConnectionError as error:
            if address:
                raise RecipeError(f"RAY_ADDRESS: {address}: no cluster answers there: {error}") from None
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
    )
