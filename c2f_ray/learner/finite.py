"""What is not finite is refused on all ranks together, and the samples that it came from are named."""

import math
from itertools import chain

import numpy as np
from torch import distributed

from c2f_ray.data.trajectory import Int64
from c2f_ray.errors import NonFiniteUpdateError

NAMED_SAMPLES = 10  # how many samples an error names


def refuse_samples(sample_ids: list[int], what: str) -> None:
    """A collective. Every rank raises the same error, so that none waits for one that has raised."""
    everywhere: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everywhere, sample_ids)
    if any(everywhere):
        raise NonFiniteUpdateError(f"{what} are not finite: {name(np.array(sorted(chain(*everywhere))))}")


def refuse_norm(norm: float, model: str, sample_ids: Int64) -> None:
    if not math.isfinite(norm):
        raise NonFiniteUpdateError(f"the {model}'s gradient has no finite norm in the update on {name(sample_ids)}")


def name(sample_ids: Int64) -> str:
    more = len(sample_ids) - NAMED_SAMPLES
    return f"samples {sample_ids[:NAMED_SAMPLES].tolist()}" + (f" and {more} more" if more > 0 else "")
