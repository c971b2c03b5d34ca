"""The store where the members of a process group meet."""

import socket
from datetime import timedelta

from torch.distributed import TCPStore


def open_store(address: str, port: int = 0, timeout_s: float = 300) -> TCPStore:
    """Listens on `address` alone, on a free port where `port` is 0; left to itself, torch listens on all interfaces.

    `timeout_s` is how long a member waits for what another has yet to set.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, port), family=family)
    return TCPStore(
        address,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listening.detach(),
    )
