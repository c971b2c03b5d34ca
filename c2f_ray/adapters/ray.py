"""Ray 2.60: what it has no public interface for."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants, services, state


def address_of_this_node() -> str:
    """Returns host:port of the cluster that was started on this node, "" if there is none.

    Raises ConnectionError when several were started. `ray.init("auto")` finds the same address, but then waits for
    minutes for a cluster that is gone.
    """
    return services.canonicalize_bootstrap_address("auto") or ""


@contextmanager
def loopback_only() -> Iterator[None]:
    """Lets `ray.init` listen on 127.0.0.1, as on macOS and Windows; otherwise Ray replaces it by the node's address.

    Ray reads RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER at import, before it is known whether a cluster will be joined, and
    with that variable off no other cluster could be joined.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """Returns the free resources by node id. `ray.available_resources` has only the sum over nodes."""
    return state.available_resources_per_node()
