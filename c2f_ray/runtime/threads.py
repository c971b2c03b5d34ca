"""CPU threads of the actors: each role uses the cores that are idle while it works.

Ray gives an actor of one CPU one thread. But engines and learner ranks take turns, and while one of them works the
cores of the other are free.
"""

import os
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "max 100000", or microseconds of CPU time per period
# Threads of OpenMP that wait spin for so many rounds. GNU's default is so long that two roles on the same cores
# take turns with each other's spinning threads; no spinning at all makes each parallel region slower.
SPIN_ROUNDS = 20_000


def thread_env(threads: int | None, working: int) -> dict[str, str]:
    """Returns the environment of a CPU actor, of which `working` work on this machine at the same time.

    `threads` is the recipe's setting; None shares the cores out evenly.
    """
    count = threads or max(1, available_cores() // working)
    return {"OMP_NUM_THREADS": str(count), "GOMP_SPINCOUNT": str(SPIN_ROUNDS)}


def available_cores(quota: Path | None = None) -> int:
    """Returns the cores that this process may use: its affinity, or a container's quota where that is less."""
    cores = len(os.sched_getaffinity(0))
    quota = quota or CGROUP_QUOTA
    if quota.is_file():
        time_us, period_us = quota.read_text().split()
        if time_us != "max":
            cores = min(cores, max(1, int(time_us) // int(period_us)))
    return cores
