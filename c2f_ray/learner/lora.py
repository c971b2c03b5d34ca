"""Low-rank adapters of the policy (LoRA), by PEFT.

Import it where there are some only: PEFT takes a second to import.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from c2f_ray.recipe import Lora
from c2f_ray.weights.source import Gather, is_adapter


def add_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Puts adapters into the model and freezes the rest. They change nothing until they have learned."""
    inject_adapter_in_model(_config(lora, None), model)


def without_adapters(engine: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """A forward of the same weights with the adapters off, without gradient: the policy that the run started from."""
    layers = [layer for layer in engine.modules() if isinstance(layer, LoraLayer)]

    def forward(*inputs: Any, **packing: Any) -> tuple[Tensor, Tensor]:
        for layer in layers:
            layer.enable_adapters(False)
        found = engine(*inputs, **packing)
        for layer in layers:
            layer.enable_adapters(True)
        return found

    return forward


def save_adapters(model: PreTrainedModel, lora: Lora, base: str, gather: Gather, folder: Path, *, write: bool) -> None:
    """Writes what PEFT loads onto ``base``, a folder or a name on the hub. On every rank; one of them has ``write``."""
    adapters = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    with gather(list(adapters.values())):
        if not write:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # PEFT's names: without that of the adapter.
        tensors = {
            f"base_model.model.{name.replace('.default.', '.')}": adapter.detach().cpu().contiguous()
            for name, adapter in adapters.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = _config(lora, base).to_dict() | {"inference_mode": True, "target_modules": sorted(lora.targets)}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _config(lora: Lora, base: str | None) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyrefly: ignore (PEFT takes a float as well)
        target_modules=lora.targets,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
