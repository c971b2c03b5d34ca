"""What is not finite is found on all ranks together, and the samples that it came from are named."""

import math
from itertools import chain

import numpy as np
from torch import distributed

from c2f_ray.data.trajectory import Int64
from c2f_ray.errors import NonFiniteUpdateError

NAMED_SAMPLES = 10  # how many samples an error names


def on_all_ranks(sample_ids: list[int]) -> list[int]:
    """A collective: what any rank has found, ascending, the same on every rank."""
    everywhere: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everywhere, sample_ids)
    return sorted(chain(*everywhere))


def refuse_samples(sample_ids: list[int], what: str) -> None:
    """Raises the same error on every rank, so that none waits for one that has raised."""
    if sample_ids:
        raise NonFiniteUpdateError(f"{what} are not finite: {name(np.array(sample_ids))}")


def refuse_norm(norm: float, model: str, sample_ids: Int64) -> None:
    if not math.isfinite(norm):
        raise NonFiniteUpdateError(f"the {model}'s gradient has no finite norm in the update on {name(sample_ids)}")


def name(sample_ids: Int64) -> str:
    more = len(sample_ids) - NAMED_SAMPLES
    return f"samples {sample_ids[:NAMED_SAMPLES].tolist()}" + (f" and {more} more" if more > 0 else "")
