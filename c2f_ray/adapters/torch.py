"""torch 2.13: what it has no public interface for."""

from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store


def gloo_group(store: Store, rank: int, world_size: int, address: str, timeout_s: float) -> Any:
    """Returns a gloo process group that listens on the interface of `address` only.

    The public constructor takes no devices, and listens wherever the host's name leads to.
    """
    gloo: Any = ProcessGroupGloo  # the stubs lack `_Options`
    options = gloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, world_size, options)
