"""How a coarse actor's weights are merged into an instruct model's, tensor by tensor. Pure, no files, no Ray.

Mistral-C2F (arXiv 2406.08657) names its Knowledge Residue Merger but publishes no formula: both methods are ours.
They differ by ``ratio * (instruct - base)``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# Which models each method reads.
ROLES = {"residue": ("instruct", "coarse", "base"), "interpolate": ("instruct", "coarse")}
FORMULAS = {
    "residue": "fine = instruct + ratio * (coarse - base)",
    "interpolate": "fine = (1 - ratio) * instruct + ratio * coarse",
}


def merge_tensor(method: str, inputs: Mapping[str, Tensor], ratio: float, dtype: torch.dtype) -> Tensor:
    """Merge one tensor in float32 and round once, to ``dtype``.

    ``inputs`` holds a floating-point tensor of the same shape for each role of the method. Ratio 0 gives the
    instruct tensor bit for bit, and ratio 1 of ``interpolate`` the coarse one (arithmetic would lose ``-0.0``).
    """
    if ratio == 0:
        return inputs["instruct"].to(dtype)
    if ratio == 1 and method == "interpolate":
        return inputs["coarse"].to(dtype)
    wide = {role: inputs[role].float() for role in ROLES[method]}
    if method == "residue":
        fine = wide["instruct"] + ratio * (wide["coarse"] - wide["base"])
    else:
        fine = (1 - ratio) * wide["instruct"] + ratio * wide["coarse"]
    return fine.to(dtype)
