"""Every element against mergekit 0.1.5 (LGPL, so never a dependency), in float32, where it is installed:

    python -m venv ORACLE && ORACLE/bin/pip install mergekit==0.1.5
    MERGEKIT_PYTHON=ORACLE/bin/python python -m pytest tests/integration/test_merge_oracle.py

mergekit fuses the experts of a Mixtral's layer into one tensor before it merges, as transformers has them in memory.
What it gives is compared with ours as transformers loads it; for `slerp` and `ties`, which look at whole tensors, we
are given the fused tensors too.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from c2f_ray.merging import plan as planning
from c2f_ray.merging.job import merge
from c2f_ray.merging.methods import NEED_WHOLE_TENSOR
from c2f_ray.recipe import load_recipe
from c2f_ray.tiny.tokenizer import policy_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
ROLES = ("base", "coarse", "instruct")
RATIO, COARSE_DENSITY, SCALE = 0.3, 0.4, 0.9

# Given to mergekit's Python, with a list of (configuration, folder to write); its documented interface.
SCRIPT = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for config, folder in json.load(sys.stdin):
    options = MergeOptions(cuda=False, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(config), out_path=folder, options=options)
"""


def make_model(family: str, tied: bool) -> PreTrainedModel:
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4))
    return MistralForCausalLM(MistralConfig(**shape)) if family == "mistral" else LlamaForCausalLM(LlamaConfig(**shape))


def mergekit_configs(models: dict[str, str]) -> dict[str, dict]:
    """What corresponds to our methods at RATIO, by method."""

    def of(role: str, **parameters: float) -> dict:
        return {"model": models[role], "parameters": parameters}

    def onto_base(method: str, normalize: bool, scale: float, **coarse: float) -> dict:
        return {
            "merge_method": method,
            "base_model": models["base"],
            "models": [of("instruct", weight=1.0), of("coarse", weight=RATIO, **coarse)],
            "parameters": {"normalize": normalize, "lambda": scale, **({"density": 1.0} if coarse else {})},
        }

    linear = [of("instruct", weight=1 - RATIO), of("coarse", weight=RATIO)]
    slerp = {"merge_method": "slerp", "base_model": models["instruct"], "parameters": {"t": RATIO}}
    configs = {
        "interpolate": {"merge_method": "linear", "models": linear},
        "slerp": slerp | {"models": [{"model": models["instruct"]}, {"model": models["coarse"]}]},
        "residue": onto_base("task_arithmetic", False, 1.0),
        "task_arithmetic": onto_base("task_arithmetic", False, SCALE),
        "ties": onto_base("ties", True, SCALE, density=COARSE_DENSITY),
        "dare": onto_base("dare_linear", False, SCALE, density=1.0),
    }
    return {method: config | {"dtype": "float32"} for method, config in configs.items()}


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def fuse(folder: Path) -> str:
    """A Mixtral with the names and tensors that transformers has in memory, beside the given one."""
    fused = folder.with_name(f"{folder.name}-fused")
    shutil.copytree(folder, fused, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = MixtralForCausalLM.from_pretrained(folder)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    return str(fused)


@pytest.mark.skipif("MERGEKIT_PYTHON" not in os.environ, reason="MERGEKIT_PYTHON does not name a Python with mergekit")
def test_mergekit_gives_the_same_elements(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_BYTES", (20_000, 20_000))
    jobs, ours = [], {}
    for family in ("llama", "mistral", "mixtral"):
        for tied in (False, True):
            for max_shard_size in ("1GB", "16KB"):
                root = tmp_path / f"{family}-{tied}-{max_shard_size}"
                models = {role: str(root / role) for role in ROLES}
                for seed, role in enumerate(ROLES):
                    torch.manual_seed(seed)
                    model = make_model(family, tied)
                    for parameter in model.parameters():
                        parameter.data.normal_(std=0.5)
                    model.save_pretrained(models[role], max_shard_size=max_shard_size)
                policy_tokenizer(with_template=True).save_pretrained(models["instruct"])
                fused = {role: fuse(Path(folder)) for role, folder in models.items()} if family == "mixtral" else models
                for method, config in mergekit_configs(models).items():
                    folder = root / "mergekit" / method
                    jobs.append((config, str(folder)))
                    given = fused if method in NEED_WHOLE_TENSOR else models
                    section = given | {"methods": [method], "ratios": [RATIO]}
                    section |= {"scale": SCALE} if method in ("task_arithmetic", "ties", "dare") else {}
                    section |= {"coarse_density": COARSE_DENSITY} if method == "ties" else {}
                    section |= {"coarse_density": 1.0} if method == "dare" else {}
                    run = (f"run.folder={root}", f"run.name={method}", f"merge={json.dumps(section)}")
                    (ours[folder],) = merge(load_recipe(CONFIGS / "tiny.yaml", *run))
    command = [os.environ["MERGEKIT_PYTHON"], "-c", SCRIPT]
    subprocess.run(command, input=json.dumps(jobs), text=True, check=True, cwd=tmp_path)
    worst: dict[str, float] = {}
    for folder, our_folder in ours.items():
        theirs, fine = load_folder(folder), load_folder(our_folder)
        if "model.layers.0.block_sparse_moe.gate.weight" in fine:
            fine = load_folder(Path(fuse(our_folder)))
        assert theirs.keys() == fine.keys(), folder
        for name, values in theirs.items():
            assert fine[name].dtype == values.dtype == torch.float32
            difference = (fine[name] - values).abs().max().item()
            worst[folder.name] = max(worst.get(folder.name, 0.0), difference)
    print(f"\nlargest differences over {len(ours)} merges: {worst}")
    assert max(worst.values()) <= 1e-6
