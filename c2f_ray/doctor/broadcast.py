"""A broadcast between processes, over the library that weights and gradients travel by.

`python -m c2f_ray.doctor.broadcast BACKEND RANK WORLD HOST PORT` is one of the processes.
"""

import subprocess
import sys
from datetime import timedelta

import torch
from torch import distributed

from c2f_ray.runtime.rendezvous import open_store

TIMEOUT_S = 60.0
ELEMENTS = 1 << 20


def open_store_here() -> tuple[distributed.TCPStore, str, int]:
    """A store where ranks meet, on this node's address, which is how others reach it."""
    from ray.util import get_node_ip_address

    host = get_node_ip_address()
    store = open_store(host)
    return store, host, store.port


def take_part(backend: str, rank: int, world: int, host: str, port: int, device: int = 0) -> None:
    """Raises where what rank 0 sends does not arrive in ``TIMEOUT_S``, or arrives changed."""
    timeout = timedelta(seconds=TIMEOUT_S)
    store = distributed.TCPStore(host, port, is_master=False, timeout=timeout)
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    sent = torch.arange(ELEMENTS, device="cuda" if backend == "nccl" else "cpu")
    received = sent.clone() if rank == 0 else torch.zeros_like(sent)
    distributed.broadcast(received, src=0)
    if not torch.equal(received, sent):
        raise RuntimeError(f"rank {rank} received other values than rank 0 sent")
    distributed.destroy_process_group()


def between_processes(backend: str) -> str | None:
    """Two processes of this node, each on a GPU of its own with NCCL. What went wrong, in a line; None if nothing."""
    store, host, port = open_store_here()
    command = [sys.executable, "-m", __name__, backend]
    processes = [
        subprocess.Popen([*command, str(rank), "2", host, str(port)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    problem = None
    for rank, process in enumerate(processes):
        try:
            _, error = process.communicate(timeout=2 * TIMEOUT_S)
        except subprocess.TimeoutExpired:
            problem = problem or f"process {rank} did not end in {2 * TIMEOUT_S:g} s"
            process.kill()
            process.communicate()
            continue
        if process.returncode != 0:
            problem = problem or (error.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    del store
    return problem


if __name__ == "__main__":
    backend, rank, world, host, port = sys.argv[1:]
    take_part(backend, int(rank), int(world), host, int(port), device=int(rank))
