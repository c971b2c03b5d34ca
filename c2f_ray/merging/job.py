"""The merge job: coarse actor and instruct model in, one ordinary Hugging Face folder per fine actor out.

Invariants: a fine folder is complete or it is not there, for all are written in `OUT.partial/` and renamed at the end.
A merge that was killed, or failed, is gone on with by the next one that is told the same, with the same bytes at the
end: each weight file is renamed when it is on the disk, and has then a record beside it.
Folders, those of inputs and output, must lie on a file system that every node of the cluster sees.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from c2f_ray.data.atomic import write_text
from c2f_ray.data.inputs import run_folder
from c2f_ray.data.shards import Shard
from c2f_ray.errors import C2FError, DeadlineError, RecipeError
from c2f_ray.merging.companions import write_companions
from c2f_ray.merging.diagnosis import DIAGNOSIS, diagnose
from c2f_ray.merging.files import room_in
from c2f_ray.merging.plan import BEGUN, MergePlan, check_merge
from c2f_ray.merging.shards import Work, merge_shard
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.roles import Role
from c2f_ray.runtime.session import ray_session


def merge(recipe: Recipe) -> list[Path]:
    """Write the recipe's fine actors, as ``METHOD-RATIO`` in the run's `fine/`, and return their folders.

    Those that are there already, of the same inputs and settings, stay. Raises RecipeError, with nothing written, when
    the models cannot be merged, or a folder is there that was made of others.
    """
    plan = check_merge(recipe)
    if plan.todo or plan.goes_on():
        with ray_session(recipe, [Role("merge", 1, 0)]):
            run_merge(plan)
    return [run_folder(recipe) / "fine" / variant.name for variant in plan.variants]


def run_merge(plan: MergePlan) -> None:
    """Carry out the plan in an initialised Ray; one task writes one shard of every variant.

    Raises DeadlineError when no shard is finished in the recipe's time, and C2FError when one cannot be written.
    """
    strategy = _strategy(plan)
    aside = plan.aside
    with room_in(aside):
        if not plan.goes_on():  # then what is there is of a merge of something else
            (aside / BEGUN).unlink(missing_ok=True)  # first: half of it must not be gone on with
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_text(aside / BEGUN, json.dumps(plan.identity))
        if plan.todo and not plan.published.exists():
            shutil.rmtree(aside / "tmp", ignore_errors=True)  # what was being written
            for name in ("tmp", "records", *(variant.name for variant in plan.todo)):
                (aside / name).mkdir(exist_ok=True)
            _run_tasks(plan, [shard for shard in plan.shards if not _record(plan, shard).exists()], strategy)
            records = [json.loads(_record(plan, shard).read_text()) for shard in plan.shards]
            write_companions(plan, records)
            if "base" in plan.models.folders:
                (aside / DIAGNOSIS).write_text(json.dumps(diagnose(records), indent=1) + "\n")
            plan.published.touch()
        plan.out.mkdir(exist_ok=True)
        for variant in plan.todo:
            (aside / variant.name).rename(plan.out / variant.name)
        if (aside / DIAGNOSIS).exists():
            (aside / DIAGNOSIS).rename(plan.out.with_name(DIAGNOSIS))
        for path in aside.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != BEGUN:
                path.unlink()
        shutil.rmtree(aside)  # last: until then the next merge ends this one


def _record(plan: MergePlan, shard: Shard) -> Path:
    return plan.aside / "records" / f"{shard.file_name}.json"


def _strategy(plan: MergePlan) -> NodeAffinitySchedulingStrategy | str:
    """Where the tasks run: on all nodes, or on this one, in whose cache alone a model from the hub lies."""
    if not plan.models.on_hub:
        return "SPREAD"
    node_id = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    if node["Resources"].get("CPU", 0) < 1:  # as on the head node of many clusters
        raise RecipeError(
            "merge: models from the hub lie in this node's cache, and the tasks must run where they are, but this "
            "node gives Ray no CPU; download them into a folder that all nodes see, and name that"
        )
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _run_tasks(plan: MergePlan, shards: Sequence[Shard], strategy: NodeAffinitySchedulingStrategy | str) -> None:
    """Merge the shards in Ray tasks of one CPU each."""
    remote = ray.remote(num_cpus=1)(merge_shard).options(scheduling_strategy=strategy)
    files = {role: {name: spec.file for name, spec in tensors.items()} for role, tensors in plan.models.tensors.items()}
    work = ray.put(Work(files, plan.models.rows, plan.todo, plan.settings, plan.aside))
    names = {remote.remote(shard, work): shard.file_name for shard in shards}
    pending = list(names)
    timeout_s = plan.recipe.timeout_s
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=timeout_s)
            if not done:
                raise DeadlineError(
                    f"merge: none of {', '.join(names[ref] for ref in pending)} was finished in {timeout_s:g} s. "
                    f"A task needs 1 CPU; the cluster has {ray.cluster_resources().get('CPU', 0):g}, of which "
                    f"{ray.available_resources().get('CPU', 0):g} are free"
                )
            ray.get(done)  # raises a failed task's error at once
    except RayTaskError as error:
        if isinstance(error.cause, C2FError):
            raise error.cause from None
        raise
    finally:
        for ref in pending:
            ray.cancel(ref, force=True)
