"""A calm run on three Ray nodes of one machine, and one in which a node is taken away in the second step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from c2f_ray import load_recipe, train
from c2f_ray.driver import training as driver
from c2f_ray.rollout.pool import RolloutPool

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SETTINGS = [
    "run.steps=3", "run.deterministic=true", "rollout.actors=2", "reward.workers=2", "learner.ranks=2",
    "prompts.per_step=12", "rollout.shard_samples=4", "length.max_tokens=24", "checkpoints.every_steps=1",
    "weights.timeout_s=30", "cluster.placement=SPREAD",
]  # fmt: skip


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    others = {node.node_id: node for node in (cluster.add_node(num_cpus=4) for _ in range(2))}
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    step = 0

    class WatchedRollouts(RolloutPool):
        def generate(self, *args: Any) -> Iterator[Any]:
            nonlocal step
            step += 1
            where = [node_of(actor) for actor in self.actors] if step == 2 else []
            for found in super().generate(*args):
                yield found
                if len(others) == 2 and (lost := next((node for node in where if node in others), None)):
                    print("took away a node with", *sorted(classes_on(lost)), flush=True)
                    cluster.remove_node(others.pop(lost), allow_graceful=False)

    folder = f"run.folder={Path('runs').absolute()}"
    train(load_recipe(CONFIG, "run.name=calm", folder, *SETTINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "RolloutPool", WatchedRollouts)
        train(load_recipe(CONFIG, "run.name=stormy", folder, *SETTINGS))
    ray.shutdown()
    cluster.shutdown()


def node_of(actor: Any) -> str:
    return ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()), timeout=60)


def classes_on(node: str) -> list[str]:
    """Of the actors that live there."""
    found = [row for row in actors().values() if row["State"] == "ALIVE" and row["Address"]["NodeID"] == node]
    return [row["ActorClassName"] for row in found]


if __name__ == "__main__":
    main()
