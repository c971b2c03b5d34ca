"""The merge job on real folders, in real Ray tasks."""

import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM
from xxhash import xxh3_128

from c2f_ray.errors import C2FError, DeadlineError, RecipeError
from c2f_ray.merging import job
from c2f_ray.merging import plan as planning
from c2f_ray.merging.job import merge, run_merge
from c2f_ray.merging.plan import check_merge
from c2f_ray.recipe import Recipe, load_recipe
from c2f_ray.tiny.tokenizer import policy_tokenizer

ROLES = ("base", "coarse", "instruct")
CONFIGS = Path(__file__).parents[2] / "configs"


def make_models(root: Path, dtype: torch.dtype, tied: bool, max_shard_size: str) -> dict[str, Path]:
    """Three random Mistral folders; each in its own sharding when ``max_shard_size`` is small."""
    config = MistralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    folders = {}
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        model = MistralForCausalLM(config).to(dtype)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.5)
        folders[role] = root / role
        # The base model is never sharded: inputs need not be split alike.
        model.save_pretrained(folders[role], max_shard_size="1GB" if role == "base" else max_shard_size)
    policy_tokenizer(with_template=True).save_pretrained(folders["instruct"])
    (folders["instruct"] / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    (folders["instruct"] / "README.md").write_text("---\nlicense: llama3\n---\n# A model\n")
    (folders["base"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folders["instruct"] / "notes.md").write_text("not for the fine actor")
    return folders


def recipe_for(models: dict[str, Path], root: Path, **settings) -> Recipe:
    """The fine actors of ``models`` go to ``root/run/fine``. Only the merge section means anything."""
    section = {role: str(model) for role, model in models.items()}
    section |= {"methods": ["residue"], "ratios": [0.4]} | settings
    run = (f"run.folder={root}", "run.name=run")
    return load_recipe(CONFIGS / "tiny.yaml", *run, f"merge={json.dumps(section)}")


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def nearest_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32) << 16).view(np.float32)


def expected_values(method: str, ratio: float, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The formulas in numpy's float32, on their own."""
    ratio32, rest32 = np.float32(ratio), np.float32(1 - ratio)
    if method == "interpolate":
        return rest32 * tensors["instruct"] + ratio32 * tensors["coarse"]
    residue = ratio32 * (tensors["coarse"] - tensors["base"])
    if method == "residue":
        return tensors["instruct"] + residue
    return tensors["base"] + ((tensors["instruct"] - tensors["base"]) + residue)  # task arithmetic


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["1GB", "16KB"])
def test_every_element_of_every_output(cluster, tmp_path, monkeypatch, dtype, tied, max_shard_size):
    models = make_models(tmp_path, dtype, tied, max_shard_size)
    assert (models["coarse"] / "model.safetensors.index.json").exists() == (max_shard_size == "16KB")
    if max_shard_size == "16KB":
        monkeypatch.setattr(planning, "SHARD_BYTES", (20_000, 20_000))
    methods, ratios = ["residue", "interpolate", "task_arithmetic"], [0.0, 0.3, 1.0]
    out = tmp_path / "run" / "fine"
    folders = merge(recipe_for(models, tmp_path, methods=methods, ratios=ratios))
    assert [folder.name for folder in folders] == [f"{m}-{r:g}" for m in methods for r in ratios]
    assert sorted(out.iterdir()) == sorted(folders)
    assert sorted(path.name for path in out.parent.iterdir()) == ["diagnosis.json", "fine"]

    inputs = {role: load_folder(folder) for role, folder in models.items()}
    for folder in folders:
        method, ratio = folder.name.split("-")
        fine = load_folder(folder)
        assert set(fine) == set(inputs["instruct"])
        assert ("lm_head.weight" in fine) != tied
        for name, tensor in fine.items():
            assert tensor.dtype == dtype
            wide = {role: tensors[name].float().numpy() for role, tensors in inputs.items()}
            values = expected_values(method, float(ratio), wide) if ratio != "0" else wide["instruct"]
            values = values if dtype == torch.float32 else nearest_bf16(values)
            assert np.array_equal(tensor.float().numpy(), values), (folder.name, name)

    def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
        return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}

    for method in methods:
        assert bits(load_folder(out / f"{method}-0")) == bits(inputs["instruct"])
    assert bits(load_folder(out / "interpolate-1")) == bits(inputs["coarse"])
    # A residue at ratio 1 keeps what instruct has beyond base.
    assert bits(load_folder(out / "residue-1")) != bits(inputs["coarse"])


def test_a_fine_folder_is_an_ordinary_one(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_BYTES", (20_000, 20_000))
    models = make_models(tmp_path, torch.float32, tied=False, max_shard_size="1GB")
    (folder,) = merge(recipe_for(models, tmp_path, dtype="bfloat16"))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_input_embeddings().weight.equal(load_folder(folder)["model.embed_tokens.weight"])

    weight_files = sorted(file.name for file in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(weight_files) > 1
    assert sorted(set(index["weight_map"].values())) == weight_files
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())

    others = {file.name for file in folder.iterdir()} - set(weight_files)
    assert others == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (models["instruct"] / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == policy_tokenizer(with_template=True).get_vocab()
    assert tokenizer.chat_template == policy_tokenizer(with_template=True).chat_template


def test_the_manifest_can_be_checked_by_hand(cluster, tmp_path):
    models = make_models(tmp_path, torch.bfloat16, tied=False, max_shard_size="16KB")
    folders = merge(recipe_for(models, tmp_path, methods=["residue", "interpolate"], ratios=[0.25]))
    manifests = [json.loads((folder / "merge.json").read_text()) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        assert manifest["ratio"] == 0.25
        assert manifest["files_xxh3_128"] == {
            "model.safetensors": xxh3_128((folder / "model.safetensors").read_bytes()).hexdigest()
        }
    assert manifests[0]["formula"] == "fine = instruct + ratio * (coarse - base)"
    assert set(manifests[0]["inputs"]) == set(ROLES)
    assert set(manifests[1]["inputs"]) == {"coarse", "instruct"}  # interpolation has no use for the base model
    for role, said in manifests[0]["inputs"].items():
        lines = "".join(
            f"{name} {xxh3_128(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()}\n"
            for name, tensor in sorted(load_folder(models[role]).items())
        )
        assert said["tensors_xxh3_128"] == xxh3_128(lines.encode()).hexdigest()
        assert said["folder"] == str(models[role])
        assert said["config"] == json.loads((models[role] / "config.json").read_text())
    card = (folders[0] / "README.md").read_text()
    assert manifests[0]["inputs"]["coarse"]["tensors_xxh3_128"] in card
    assert metadata_load(folders[0] / "README.md")["license"] == "llama3"
    assert f"| base | `{models['base']}` | apache-2.0 |" in card
    assert f"| coarse | `{models['coarse']}` | not stated |" in card


def test_settings_and_schedules_are_in_the_manifest(cluster, tmp_path):
    models = make_models(tmp_path, torch.float32, tied=False, max_shard_size="1GB")
    schedule = {
        "name": "late",
        "ratio": 0.0,
        "rules": [{"gradient": [0.0, 0.5]}, {"modules": "lm_head.*", "ratio": 1.0}],
    }
    methods = ["interpolate", "dare", "ties"]
    settings = {"ratios": [], "schedules": [schedule], "coarse_density": 0.25, "scale": 0.5}
    folders = merge(recipe_for(models, tmp_path, methods=methods, **settings))
    assert [folder.name for folder in folders] == ["interpolate-late", "dare-late", "ties-late"]
    manifests = [json.loads((folder / "merge.json").read_text()) for folder in folders]
    assert [manifest["ratio"]["name"] for manifest in manifests] == ["late"] * 3
    assert manifests[0]["ratio"]["rules"][0]["gradient"] == [0.0, 0.5]
    kept = {"scale": 0.5, "coarse_density": 0.25, "instruct_density": 1.0}
    assert "scale" not in manifests[0]
    assert {key: manifests[2][key] for key in kept} == kept
    assert "seed" not in manifests[2]
    assert manifests[1]["seed"] == 1  # the recipe's run.seed
    inputs = {role: load_folder(folder) for role, folder in models.items()}
    fine = load_folder(folders[0])
    assert torch.equal(fine["lm_head.weight"], inputs["coarse"]["lm_head.weight"])
    for name in fine:
        if not name.startswith("model.layers.1."):
            assert name == "lm_head.weight" or torch.equal(fine[name], inputs["instruct"][name])
        else:
            assert torch.equal(fine[name], inputs["instruct"][name] * 0.5 + inputs["coarse"][name] * 0.5)


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def crop_embeddings(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()


REFUSALS = {
    "rope_theta is 10000.0 in base, 10000.0 in coarse, 1000000.0 in instruct": lambda models: change_config(
        models["instruct"], rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
    ),
    "holds only .bin files, which are pickles": lambda models: (models["instruct"] / "model.safetensors").rename(
        models["instruct"] / "pytorch_model.bin"
    ),
    "tensor model.norm.weight is in base, instruct but not in coarse": lambda models: change_tensors(
        models["coarse"], lambda tensors: tensors.pop("model.norm.weight")
    ),
    "model.embed_tokens.weight has shape [96, 32] in base, [96, 32] in coarse, [95, 32] in instruct": (
        lambda models: change_tensors(models["instruct"], crop_embeddings)
    ),
}


@pytest.mark.parametrize("said", REFUSALS)
def test_a_refusal_leaves_nothing_written(tmp_path, said):
    models = make_models(tmp_path, torch.float32, tied=False, max_shard_size="1GB")
    REFUSALS[said](models)
    with pytest.raises(RecipeError) as refusal:
        check_merge(recipe_for(models, tmp_path))
    assert said in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == set(models)


def test_an_allowed_difference_is_merged_and_recorded(cluster, tmp_path):
    models = make_models(tmp_path, torch.float32, tied=False, max_shard_size="1GB")
    change_config(models["instruct"], rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    (folder,) = merge(recipe_for(models, tmp_path, allow=["rope_theta"]))
    assert json.loads((folder / "merge.json").read_text())["allow"] == ["rope_theta"]
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e6


def test_an_existing_model_is_not_overwritten(cluster, tmp_path):
    models = make_models(tmp_path, torch.float32, tied=False, max_shard_size="1GB")
    (folder,) = merge(recipe_for(models, tmp_path))
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert merge(recipe_for(models, tmp_path)) == [folder]
    with pytest.raises(RecipeError, match=r"residue-0\.4 is there, of other inputs, settings or versions, and is not"):
        check_merge(recipe_for(models, tmp_path, ratios=[0.2, 0.4], dtype="bfloat16"))
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["residue-0.4"]
    # A killed job leaves its work in `fine.partial`, which one that merges something else replaces.
    half = tmp_path / "run" / "fine.partial" / "residue-0.1"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    merge(recipe_for(models, tmp_path, ratios=[0.2, 0.4]))
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert not half.parent.exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["residue-0.2", "residue-0.4"]


def test_a_failure_halfway_leaves_no_folder(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_BYTES", (20_000, 20_000))
    models = make_models(tmp_path, torch.float32, tied=False, max_shard_size="1GB")
    change_tensors(models["coarse"], lambda tensors: tensors["model.norm.weight"].fill_(1e38))
    with pytest.raises(
        C2FError, match=r"residue-0\.5 has values in model\.norm\.weight that are not finite in float16"
    ):
        merge(recipe_for(models, tmp_path, ratios=[0.0, 0.5], dtype="float16"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["fine.partial"]
    merge(recipe_for(models, tmp_path, ratios=[0.0, 0.5], dtype="bfloat16"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["diagnosis.json", "fine"]


def test_a_cluster_without_room_is_named_at_the_deadline(cluster, tmp_path):
    models = make_models(tmp_path, torch.float32, tied=False, max_shard_size="1GB")
    group = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])  # takes all there is
    ray.get(group.ready(), timeout=1800)
    try:
        with pytest.raises(
            DeadlineError,
            match=r"none of model\.safetensors was finished in 1 s.*the cluster has \d+, of which 0 are free",
        ):
            run_merge(check_merge(recipe_for(models, tmp_path, timeout_s=1)))
    finally:
        ray.util.remove_placement_group(group)
    assert not (tmp_path / "run" / "fine").exists()


@pytest.fixture
def instruct_on_hub(tmp_path, monkeypatch) -> dict[str, Path]:
    """Models of which the instruct model is one of the hub's, downloaded into the cache before."""
    models = make_models(tmp_path, torch.float32, tied=False, max_shard_size="1GB")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--instruct"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    models["instruct"].rename(repository / "snapshots" / commit)
    return models | {"instruct": Path("org/instruct")}


def test_models_of_the_hub_are_merged_on_the_node_that_has_them(cluster, tmp_path, monkeypatch, instruct_on_hub):
    placed = []
    run_tasks = job._run_tasks
    monkeypatch.setattr(job, "_run_tasks", lambda *args: placed.append(args[2]) or run_tasks(*args))
    (folder,) = merge(recipe_for(instruct_on_hub, tmp_path, ratios=[0.0]))
    (strategy,) = placed
    assert (strategy.node_id, strategy.soft) == (ray.get_runtime_context().get_node_id(), False)
    (snapshot,) = (tmp_path / "hub" / "models--org--instruct" / "snapshots").iterdir()
    assert load_file(folder / "model.safetensors").keys() == load_file(snapshot / "model.safetensors").keys()
    assert (folder / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_a_node_without_cpus_cannot_merge_models_of_the_hub(cluster, tmp_path, monkeypatch, instruct_on_hub):
    plan = check_merge(recipe_for(instruct_on_hub, tmp_path))
    here = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": here, "Resources": {"GPU": 8.0}}])
    with pytest.raises(RecipeError) as refusal:
        run_merge(plan)
    assert refusal.value.problems == (
        "merge: models from the hub lie in this node's cache, and the tasks must run where they are, but this node "
        "gives Ray no CPU; download them into a folder that all nodes see, and name that",
    )
    assert not (tmp_path / "run").exists()
