import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from c2f_ray import cli
from c2f_ray.data.model_folder import TensorSpec, find_model, read_tensors
from c2f_ray.data.shards import Shard, plan_shards
from c2f_ray.errors import C2FError, RecipeError
from c2f_ray.merging import compatibility
from c2f_ray.merging.compatibility import check_inputs
from c2f_ray.merging.methods import merge_tensor
from c2f_ray.merging.shards import Variant, merge_shard
from c2f_ray.tiny.tokenizer import policy_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes) -> Path:
    policy_tokenizer(with_template=True).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MISTRAL | changes))
    save_file({"a": torch.ones(3)} if tensors is None else tensors, folder / "model.safetensors")
    return folder


def given(**models: Path) -> dict[str, tuple[str, str]]:
    return {role: (f"merge.{role}", str(folder)) for role, folder in models.items()}


def specs_of(folder: Path) -> dict[str, TensorSpec]:
    return read_tensors(find_model("merge.instruct", str(folder)))


def shards_of(specs: dict[str, TensorSpec], dtype: str | None = None, max_bytes: int = 10**9) -> list[Shard]:
    return plan_shards({name: (dtype or spec.dtype, spec.shape) for name, spec in specs.items()}, max_bytes)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest, ties to even, by integer arithmetic."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def test_hand_worked_merges():
    inputs = {
        "instruct": torch.tensor([1.0, -2.0]),
        "coarse": torch.tensor([3.0, 6.0]),
        "base": torch.tensor([2.0, 2.0]),
    }
    # residue 0.5: 1 + 0.5 * (3 - 2), -2 + 0.5 * (6 - 2); interpolate 0.25: 0.75 * 1 + 0.25 * 3, 0.75 * -2 + 0.25 * 6
    assert merge_tensor("residue", inputs, 0.5, torch.float32).tolist() == [1.5, 0.0]
    assert merge_tensor("interpolate", inputs, 0.25, torch.float32).tolist() == [1.5, 0.0]
    # The two differ by ratio * (instruct - base).
    difference = merge_tensor("residue", inputs, 0.5, torch.float32) - merge_tensor(
        "interpolate", inputs, 0.5, torch.float32
    )
    assert difference.tolist() == [-0.5, -2.0]


@pytest.mark.parametrize("method", ["residue", "interpolate"])
def test_bf16_is_rounded_once_from_float32(method):
    generator = torch.Generator().manual_seed(0)
    roles = ("instruct", "coarse", "base")
    inputs = {role: torch.randn(20_000, generator=generator).to(torch.bfloat16) for role in roles}
    instruct, coarse, base = (inputs[role].float().numpy() for role in roles)
    ratio = np.float32(0.3)
    expected = (
        instruct + ratio * (coarse - base) if method == "residue" else np.float32(0.7) * instruct + ratio * coarse
    )
    fine = merge_tensor(method, inputs, 0.3, torch.bfloat16)
    assert np.array_equal(fine.view(torch.uint16).numpy(), round_to_bf16(expected))


def test_the_ends_of_the_range_keep_every_bit():
    # Arithmetic would turn -0.0 into 0.0.
    instruct, coarse = torch.tensor([-0.0, 1e-45, 3.0]), torch.tensor([-0.0, -1e-45, 7.0])
    inputs = {"instruct": instruct, "coarse": coarse, "base": torch.tensor([5.0, 5.0, 5.0])}

    def bits(tensor: torch.Tensor) -> list[int]:
        return tensor.view(torch.int32).tolist()

    for method in ("residue", "interpolate"):
        assert bits(merge_tensor(method, inputs, 0.0, torch.float32)) == bits(instruct)
    assert bits(merge_tensor("interpolate", inputs, 1.0, torch.float32)) == bits(coarse)
    assert merge_tensor("residue", inputs, 1.0, torch.float32).tolist() == [-5.0, -5.0, 5.0]


def test_a_rope_theta_difference_is_refused_wherever_the_config_keeps_it(tmp_path):
    base = write_model(tmp_path / "base")
    nested = {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    instruct = write_model(tmp_path / "instruct", sliding_window=None, **nested)
    models = given(base=base, coarse=base, instruct=instruct)
    with pytest.raises(RecipeError) as refusal:
        check_inputs(models)
    remedy = "weights trained under different values do not add up. Take an instruct model made from this base, or list"
    assert refusal.value.problems == (
        "merge: rope_theta is 10000.0 in base, 10000.0 in coarse, 1000000.0 in instruct: "
        f"{remedy} rope_theta in merge.allow",
        f"merge: sliding_window is 4096 in base, 4096 in coarse, None in instruct: {remedy} "
        "sliding_window in merge.allow",
    )
    assert set(check_inputs(models, allow=["rope_theta", "sliding_window"])) == set(models)


def test_a_field_left_at_its_default_is_no_difference(tmp_path):
    base = write_model(tmp_path / "base")
    instruct = write_model(tmp_path / "instruct", rms_norm_eps=1e-6, attention_dropout=0.1, eos_token_id=7)
    check_inputs(given(base=base, instruct=instruct))
    other = write_model(tmp_path / "other", rms_norm_eps=1e-5)
    with pytest.raises(RecipeError, match=r"rms_norm_eps is 1e-06 in base, 1e-05 in instruct"):
        check_inputs(given(base=base, instruct=other))


def test_a_misspelt_allowance_is_refused(tmp_path):
    base = write_model(tmp_path / "base")
    with pytest.raises(RecipeError, match=r"merge\.allow: 'rope_teta'"):
        check_inputs(given(base=base, instruct=base), allow=["rope_teta"])


def test_all_tensor_problems_are_named_together(tmp_path):
    base = write_model(tmp_path / "base", {"a": torch.ones(3), "b": torch.ones(2, 2), "q": torch.ones(2)})
    quantised = {"a": torch.ones(4), "c": torch.ones(1), "q": torch.ones(2, dtype=torch.int8)}
    instruct = write_model(tmp_path / "instruct", quantised)
    with pytest.raises(RecipeError) as refusal:
        check_inputs(given(base=base, instruct=instruct))
    assert refusal.value.problems == (
        "merge: tensor a has shape [3] in base, [4] in instruct",
        "merge: tensor b is in base but not in instruct",
        "merge: tensor c is in instruct but not in base",
        "merge: tensor q is I8 in instruct: give unquantised weights",
    )


def add_token(folder: Path, token: str) -> None:
    tokenizer = policy_tokenizer(with_template=True)
    assert tokenizer.add_tokens([token]) == 1
    tokenizer.save_pretrained(folder)


def test_other_vocabularies_are_refused_unless_allowed(tmp_path):
    base, instruct = write_model(tmp_path / "base"), write_model(tmp_path / "instruct")
    new_id = len(policy_tokenizer(with_template=True))
    add_token(instruct, "<one>")
    remedy = "Take an instruct model made from this base, or list tokenizer in merge.allow"
    models = given(base=base, coarse=base, instruct=instruct)
    with pytest.raises(RecipeError) as refusal:
        check_inputs(models)
    assert refusal.value.problems == (
        f"merge: the token '<one>' has id none in base, none in coarse, {new_id} in instruct. {remedy}",
    )
    add_token(base, "<two>")
    with pytest.raises(RecipeError) as refusal:
        check_inputs(given(base=base, instruct=instruct))
    assert refusal.value.problems == (
        f"merge: the token '<one>' has id none in base, {new_id} in instruct (and 1 more tokens differ). {remedy}",
    )
    assert set(check_inputs(models, allow=["tokenizer"])) == set(models)


def test_only_the_instruct_model_must_have_a_tokenizer(tmp_path):
    base, instruct = write_model(tmp_path / "base"), write_model(tmp_path / "instruct")
    (base / "tokenizer.json").unlink()
    check_inputs(given(base=base, instruct=instruct))
    with pytest.raises(RecipeError) as refusal:
        check_inputs(given(base=instruct, instruct=base))
    assert refusal.value.problems == (
        f"merge.instruct: {base}: no tokenizer (tokenizer.json or tokenizer.model); save it beside the model",
    )


def test_nothing_is_downloaded_for_models_that_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "fetch", lambda model, files: pytest.fail(f"fetched {model}"))
    base, instruct = write_model(tmp_path / "base"), write_model(tmp_path / "instruct", hidden_size=32)
    with pytest.raises(RecipeError, match=r"hidden_size is 16 in base, 32 in instruct"):
        check_inputs(given(base=base, instruct=instruct))


def refused(monkeypatch, capsys, *overrides: str) -> list[str]:
    """What `c2f-ray merge` prints when it ends with exit code 2, without Ray."""
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setattr(sys, "argv", ["c2f-ray", "merge", str(CONFIGS / "tiny.yaml"), "run.folder=runs", *overrides])
    with pytest.raises(SystemExit) as exit_code:
        cli.main()
    assert exit_code.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_bad_input_is_found_before_ray_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    coarse = write_model(tmp_path / "coarse")
    assert refused(monkeypatch, capsys, "merge.instruct=nowhere") == [
        "error: merge.coarse: runs/tiny/coarse: no coarse actor there; run `c2f-ray train` with this recipe first"
    ]
    (coarse / "model.safetensors").rename(coarse / "adapter_model.safetensors")
    assert refused(monkeypatch, capsys, "merge.coarse=coarse", "merge.instruct=nowhere", "policy.model=./gone") == [
        "error: policy.model: ./gone: no such folder",
        "error: merge.coarse: coarse: holds only an adapter; merge it into its model first (peft's merge_and_unload)",
        "error: merge.instruct: nowhere: no such folder",
    ]
    (coarse / "adapter_model.safetensors").rename(coarse / "model.safetensors")
    models = ["merge.coarse=coarse", "merge.instruct=coarse"]
    assert refused(monkeypatch, capsys, *models, "merge.base=gone") == ["error: merge.base: gone: no such folder"]
    assert refused(monkeypatch, capsys, *models, "merge.base=coarse", "merge.ratios=[0.5, 0.5]") == [
        "error: merge: interpolate-0.5 is asked for twice",
        "error: merge: residue-0.5 is asked for twice",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["coarse"]


def test_shards_hold_at_most_the_limit_and_every_tensor_once(tmp_path):
    tensors = {"a": torch.ones(10), "b": torch.ones(90), "c": torch.ones(11), "d": torch.ones(3)}
    specs = specs_of(write_model(tmp_path / "model", tensors))
    # bf16: 20, 180, 22 and 6 bytes; b is larger than the limit and gets a file of its own.
    shards = shards_of(specs, "BF16", max_bytes=40)
    assert [sorted(shard.tensors) for shard in shards] == [["a"], ["b"], ["c", "d"]]
    assert [shard.file_name for shard in shards] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [shard.num_bytes for shard in shards] == [20, 180, 28]
    assert [shard.file_name for shard in shards_of(specs, max_bytes=456)] == ["model.safetensors"]


def test_written_files_are_what_safetensors_itself_reads(tmp_path, monkeypatch):
    """Mixed dtypes, a scalar, an odd length, and tensors of several chunks of rows."""
    monkeypatch.setattr("c2f_ray.merging.shards.CHUNK_ELEMENTS", 12)
    tensors = {
        "odd": torch.randn(3).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "matrix": torch.randn(7, 5),
        "long": torch.randn(50).to(torch.float16),
    }
    folder = write_model(tmp_path / "model", tensors)
    specs = specs_of(folder)
    (shard,) = shards_of(specs)
    out = tmp_path / "out"
    out.mkdir()
    merge_shard(shard, {"instruct": specs, "coarse": specs}, [Variant("interpolate", 0.0)], {"interpolate-0": out})
    loaded = load_file(out / "model.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_inputs_are_read_once_however_many_outputs(tmp_path, monkeypatch):
    read: dict[Path, int] = {}

    class CountingFile:
        def __init__(self, path: Path, **options):
            self.path, self.file = path, safe_open(path, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def get_slice(self, name):
            return CountingSlice(self.path, self.file.get_slice(name))

    class CountingSlice:
        def __init__(self, path, part):
            self.path, self.part = path, part

        def __getitem__(self, rows):
            values = self.part[rows]
            read[self.path] = read.get(self.path, 0) + values.nbytes
            return values

    monkeypatch.setattr("c2f_ray.merging.shards.safe_open", CountingFile)
    monkeypatch.setattr("c2f_ray.merging.shards.CHUNK_ELEMENTS", 8)
    roles = ("base", "coarse", "instruct")
    tensors = {"a": torch.ones(9, 3), "b": torch.ones(5)}  # 32 elements, 128 bytes
    specs = {role: specs_of(write_model(tmp_path / role, tensors)) for role in roles}
    variants = [Variant(method, ratio) for method in ("residue", "interpolate") for ratio in (0.0, 0.3, 0.6)]
    folders = {variant.name: tmp_path / variant.name for variant in variants}
    for folder in folders.values():
        folder.mkdir()
    (shard,) = shards_of(specs["instruct"])
    merge_shard(shard, specs, variants, folders)
    assert read == {tmp_path / role / "model.safetensors": 128 for role in roles}


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    instruct = specs_of(write_model(tmp_path / "instruct", {"a": torch.tensor([1.0, 60000.0])}))
    coarse = specs_of(write_model(tmp_path / "coarse", {"a": torch.tensor([1.0, 80000.0])}))
    (shard,) = shards_of(instruct, "F16")
    with pytest.raises(C2FError, match=r"interpolate-0\.5 has values in a that are not finite in F16"):
        merge_shard(
            shard,
            {"instruct": instruct, "coarse": coarse},
            [Variant("interpolate", 0.5)],
            {"interpolate-0.5": tmp_path},
        )
