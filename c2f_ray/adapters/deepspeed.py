"""DeepSpeed 0.19: the state that it hangs on parameters and optimizers.

DeepSpeed chooses its accelerator at import, so it is imported inside functions. Parameters have type Any, because
DeepSpeed sets attributes on them. What is private here: `_hp_mapping`, since the public `safe_get_full_*` of ZeRO-1
and ZeRO-2 all-reduces whole parameters and only ZeRO-3 has `safe_get_local_*`; the linking of optimizer states, which
otherwise happens in the first step; and the table of operators that DeepSpeed would compile.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


def disable_shared_memory_collective() -> None:
    """Keeps `deepspeed.init_distributed` from compiling its own CPU all-reduce; gloo does the work as well."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Returns the shape of the whole parameter, also when ZeRO-3 has partitioned it. Gathers nothing."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def adam(engine: Any) -> torch.optim.Optimizer:
    """Returns the AdamW inside DeepSpeed's optimizer."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def read_part(engine: Any, parameter: Any) -> tuple[int, dict[str, Tensor]]:
    """Reads what this rank holds of a trainable parameter, without a collective.

    Returns:
        (start of the part in the flat parameter, float32 tensors [n] by kind). Kinds are "weight", the master weights,
        and, once AdamW has them, its moments "exp_avg" and "exp_avg_sq". The dict is empty when the rank holds
        nothing. Under ZeRO-0 to ZeRO-2 the tensors are views; under ZeRO-3 they may be copies.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:  # the parameter is its own master: bfloat16 without ZeRO is refused
        state = adam(engine).state.get(parameter, {})
        return 0, {WEIGHT: parameter.view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS if kind in state}
    if stage == 3:
        return _read_zero3(engine, parameter)
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {}
    moments = mapping.optim_fragment or {}
    part = {WEIGHT: mapping.hp_fragment} | {kind: moments[kind] for kind in MOMENTS if kind in moments}
    return mapping.lp_fragment_address.start, part


def _read_zero3(engine: Any, parameter: Any) -> tuple[int, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    start, numel = _zero3_span(parameter)
    if numel == 0:
        return start, {}
    part = {WEIGHT: safe_get_local_fp32_param(parameter)[:numel]}
    if adam(engine).state:
        part |= {kind: safe_get_local_optimizer_state(parameter, kind)[:numel] for kind in MOMENTS}
    return start, part


def write_part(engine: Any, parameter: Any, kind: str, values: Tensor) -> None:
    """Replaces one kind of what `read_part` returns; `values` is float32 [n]."""
    if engine.zero_optimization_stage() < 3:
        read_part(engine, parameter)[1][kind].data.copy_(values)
        return
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    padded = torch.zeros(parameter.ds_tensor.numel(), dtype=values.dtype)
    padded[: len(values)] = values
    if kind == WEIGHT:
        safe_set_local_fp32_param(parameter, padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, kind)


def write_computing_copy(engine: Any, parameter: Any, read: Callable[[int, int], Tensor]) -> None:
    """Writes the copy that the forward pass uses, in its dtype; `read(start, stop)` gives the flat float32 weights."""
    numel = prod(full_shape(parameter))
    if engine.zero_optimization_stage() < 3:
        parameter.data.copy_(read(0, numel).view(parameter.shape))
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    start, held = _zero3_span(parameter)
    if held > 0:
        parameter.ds_tensor.data.view(-1)[:held].copy_(read(start, start + held))
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # a small one, which DeepSpeed never partitions
        parameter.data.copy_(read(0, numel).view(parameter.ds_shape))


def start_moments(engine: Any, steps: int) -> None:
    """Creates AdamW's state, zero moments after `steps` steps, which AdamW itself would do in its first step."""
    stage, state = engine.zero_optimization_stage(), adam(engine).state
    if stage == 3:
        masters = engine.optimizer.fp32_partitioned_groups_flat
    else:
        masters = [master for group in adam(engine).param_groups for master in group["params"]]
    for master in masters:
        state[master]["step"] = torch.tensor(float(steps), device=master.device)
        for kind in MOMENTS:
            state[master].setdefault(kind, torch.zeros_like(master, requires_grad=False))
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _zero3_span(parameter: Any) -> tuple[int, int]:
    """Returns (start, elements) of this rank's equal part; the last ones may be short or empty."""
    size = parameter.ds_tensor.numel()
    start = size * distributed.get_rank(parameter.ds_process_group)
    return start, max(0, min(size, parameter.ds_numel - start))
