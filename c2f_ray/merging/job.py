"""The merge job: coarse actor and instruct model in, one ordinary Hugging Face folder per fine actor out.

Invariant: a fine folder is complete or it is not there: all are written in `OUT.partial/` and renamed at the end.
Folders, those of inputs and output, must lie on a file system that every node of the cluster sees.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from c2f_ray.errors import DeadlineError, RecipeError
from c2f_ray.merging.companions import write_companions
from c2f_ray.merging.plan import MergePlan, check_merge
from c2f_ray.merging.shards import ShardDigests, merge_shard
from c2f_ray.preflight import Needs
from c2f_ray.recipe import Recipe
from c2f_ray.session import ray_session


def merge(recipe: Recipe) -> list[Path]:
    """Write the recipe's fine actors, as ``METHOD-RATIO`` in the run's `fine/`, and return their folders.

    Raises RecipeError, with nothing written, when the models cannot be merged or an output folder exists.
    """
    plan = check_merge(recipe)
    with ray_session(recipe, Needs(gpus=0, cpus=1, gpus_of_one_actor=0)):
        return run_merge(plan)


def run_merge(plan: MergePlan, timeout_s: float = 3600) -> list[Path]:
    """Carry out the plan in an initialised Ray; one task writes one shard of every variant.

    Raises DeadlineError when no shard is finished for ``timeout_s`` seconds.
    """
    strategy = _strategy(plan)
    aside = plan.out.with_name(plan.out.name + ".partial")
    partial = {variant.name: aside / variant.name for variant in plan.variants}
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a merge that was killed
        for folder in partial.values():
            folder.mkdir(parents=True)
        digests = _run_tasks(plan, partial, strategy, timeout_s)
        write_companions(plan, partial, digests)
        plan.out.mkdir(parents=True, exist_ok=True)
        return [folder.rename(plan.out / name) for name, folder in partial.items()]
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _strategy(plan: MergePlan) -> NodeAffinitySchedulingStrategy | str:
    """Where the tasks run: anywhere, or on this node, in whose cache alone a model from the hub lies."""
    if not any(model.from_hub for model in plan.inputs.values()):
        return "DEFAULT"
    node_id = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    if node["Resources"].get("CPU", 0) < 1:  # as on the head node of many clusters
        raise RecipeError(
            "merge: models from the hub lie in this node's cache, and the tasks must run where they are, but this "
            "node gives Ray no CPU; download them into a folder that all nodes see, and name that"
        )
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _run_tasks(
    plan: MergePlan, folders: Mapping[str, Path], strategy: NodeAffinitySchedulingStrategy | str, timeout_s: float
) -> list[ShardDigests]:
    """Merge all shards in Ray tasks of one CPU each; the results are in the order of the plan's shards."""
    remote = ray.remote(num_cpus=1)(merge_shard).options(scheduling_strategy=strategy)
    refs = [
        remote.remote(
            shard,
            {role: {name: model.tensors[name] for name in shard.tensors} for role, model in plan.inputs.items()},
            plan.variants,
            folders,
        )
        for shard in plan.shards
    ]
    file_names = {ref: shard.file_name for ref, shard in zip(refs, plan.shards, strict=True)}
    pending = refs
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=timeout_s)
            if not done:
                raise DeadlineError(
                    f"merge: none of {', '.join(file_names[ref] for ref in pending)} was finished in {timeout_s} s. "
                    f"A task needs 1 CPU; the cluster has {ray.cluster_resources().get('CPU', 0):g}, of which "
                    f"{ray.available_resources().get('CPU', 0):g} are free"
                )
            ray.get(done)  # raises a failed task's error at once
    finally:
        for ref in pending:
            ray.cancel(ref, force=True)
    return ray.get(refs)
