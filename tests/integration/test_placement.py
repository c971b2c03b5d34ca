"""Room for all actors of a run, or an error that says who waited for what."""

import re
import time

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group_table

from c2f_ray.errors import DeadlineError
from c2f_ray.recipe import Cluster
from c2f_ray.runtime.placement import ANYWHERE, Role, reserved


@ray.remote(num_cpus=1)
class Somewhere:
    def group(self) -> str:
        return ray.util.get_current_placement_group().id.hex()


def test_each_actor_has_a_bundle_and_the_room_is_given_back(cluster: None):
    with reserved([Role("rollout", 2, 0), Role("learner", 1, 0)], Cluster(placement="SPREAD")) as placement:
        table = placement_group_table(placement.group)
        assert (table["strategy"], table["bundles"]) == ("SPREAD", {number: {"CPU": 1.0} for number in range(3)})
        actors = [Somewhere.options(**placement.options("rollout", n)).remote() for n in range(2)]
        actors.append(Somewhere.options(**placement.options("learner", 0)).remote())
        found = ray.get([actor.group.remote() for actor in actors], timeout=1800)
        assert set(found) == {placement.group.id.hex()}
    for _ in range(100):
        if placement_group_table(placement.group)["state"] == "REMOVED":
            break
        time.sleep(0.1)
    assert placement_group_table(placement.group)["state"] == "REMOVED"
    with pytest.raises(RayActorError):  # Ray ends the actors soon after, not at once
        for _ in range(100):
            ray.get(actors[0].group.remote(), timeout=1800)
            time.sleep(0.1)
    assert ANYWHERE.options("rollout", 7) == {}


def test_too_little_room_is_said_again_and_again_and_then_an_error(cluster: None, monkeypatch, capsys):
    monkeypatch.setattr("c2f_ray.runtime.placement.SAY_EVERY_S", 0.5)
    roles = [Role("rollout", 2, 4), Role("reward reward", 1, 1), Role("learner", 1, 0)]
    wanted = "room for rollout: 2 x 4 GPU; reward reward: 1 x 1 GPU; learner: 1 x 1 CPU; the cluster has free: node 0: "
    with pytest.raises(DeadlineError) as error, reserved(roles, Cluster(start_timeout_s=1.7)):
        pass
    assert re.fullmatch(rf"no room after 1.7 s: waited for {wanted}\d of 8 CPU", str(error.value))
    said = capsys.readouterr().out.splitlines()
    assert 1 <= len(said) <= 3
    assert all(wanted in line for line in said)
