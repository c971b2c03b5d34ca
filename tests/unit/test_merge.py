"""What can be merged, and the files that a merge writes."""

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128

from c2f_ray import cli
from c2f_ray.data.shards import Shard, plan_shards
from c2f_ray.errors import C2FError, RecipeError
from c2f_ray.merging import compatibility, shards
from c2f_ray.merging.compatibility import check_inputs
from c2f_ray.merging.diagnosis import diagnose
from c2f_ray.merging.files import InputFile
from c2f_ray.merging.methods import ROLES, Settings, Whole, merge_piece, widen
from c2f_ray.merging.shards import Variant, Work, merge_shard
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
    assert set(check_inputs(models, allow=["rope_theta", "sliding_window"]).folders) == set(models)


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


def add_tokens(folder: Path, *tokens: str) -> None:
    tokenizer = policy_tokenizer(with_template=True)
    assert tokenizer.add_tokens(list(tokens)) == len(tokens)
    tokenizer.save_pretrained(folder)


def test_rows_are_matched_by_token_where_vocabularies_differ(tmp_path):
    """A token that instruct has added, two that the others have added before one that it shares, and padding."""
    size = len(policy_tokenizer(with_template=True))
    folders = {}
    added_tokens = {"base": (), "coarse": ("<x>", "<y>", "<b>"), "instruct": ("<a>", "<b>")}
    for (role, added), rows in zip(added_tokens.items(), (size, size + 3, size + 6), strict=True):
        tensors = {"model.embed_tokens.weight": torch.ones(rows, 4), "model.norm.weight": torch.ones(4)}
        folders[role] = write_model(tmp_path / role, tensors, vocab_size=rows)
        add_tokens(folders[role], *added)
    models = check_inputs(given(**folders))
    assert set(models.rows) == {"model.embed_tokens.weight"}
    rows = models.rows["model.embed_tokens.weight"]
    assert rows["base"].tolist() == [*range(size), -1, -1, -1, -1, -1, -1]
    assert rows["coarse"].tolist() == [*range(size), -1, size + 2, -1, -1, -1, -1]
    assert models.absent_tokens == 6
    # Without the base model, <b> is merged as well.
    assert check_inputs(given(coarse=folders["coarse"], instruct=folders["instruct"])).absent_tokens == 5
    assert check_inputs(given(base=folders["base"], instruct=folders["base"])).rows == {}


def test_padding_alone_also_matches_rows_by_token(tmp_path):
    size = len(policy_tokenizer(with_template=True))
    short = write_model(tmp_path / "short", {"lm_head.weight": torch.ones(size, 4)})
    padded = write_model(tmp_path / "padded", {"lm_head.weight": torch.ones(size + 2, 4)})
    assert check_inputs(given(coarse=short, instruct=padded)).rows["lm_head.weight"]["coarse"].tolist() == [
        *range(size),
        -1,
        -1,
    ]
    assert check_inputs(given(coarse=padded, instruct=short)).rows["lm_head.weight"]["coarse"].tolist() == [
        *range(size)
    ]
    (short / "tokenizer.json").unlink()
    with pytest.raises(RecipeError) as refusal:
        check_inputs(given(coarse=short, instruct=padded))
    assert refusal.value.problems == (
        f"merge: tensor lm_head.weight has shape [{size}, 4] in coarse, [{size + 2}, 4] in instruct",
    )


def test_another_vocabulary_is_refused_unless_allowed(tmp_path):
    size = len(policy_tokenizer(with_template=True))
    tensors = {"model.embed_tokens.weight": torch.ones(2 * size, 4)}
    base, instruct = write_model(tmp_path / "base", tensors), write_model(tmp_path / "instruct", tensors)
    add_tokens(instruct, *(f"<{i}>" for i in range(size)))
    models = given(base=base, coarse=base, instruct=instruct)
    said = "and instruct share 50.0% of their tokens, less than 90%: their embeddings do not add up. Take an instruct "
    said += "model made from this base, or list tokenizer in merge.allow to merge the rows of those that they share"
    with pytest.raises(RecipeError) as refusal:
        check_inputs(models)
    assert refusal.value.problems == (f"merge: base {said}", f"merge: coarse {said}")
    assert check_inputs(models, allow=["tokenizer"]).absent_tokens == size
    (base / "tokenizer.json").unlink()
    add_tokens(tmp_path / "instruct", "<one>")
    other = write_model(tmp_path / "other", tensors)
    with pytest.raises(RecipeError, match=r"the vocabularies differ, and \S+base has no tokenizer to match rows by"):
        check_inputs(given(base=base, coarse=other, instruct=instruct))


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


def test_shards_hold_at_most_the_limit_and_every_tensor_once():
    # bf16: 20, 180, 22 and 6 bytes; b is larger than the limit and gets a file of its own.
    tensors = {name: ("BF16", (count,)) for name, count in {"a": 10, "b": 90, "c": 11, "d": 3}.items()}
    planned = plan_shards(tensors, max_bytes=40)
    assert [sorted(shard.tensors) for shard in planned] == [["a"], ["b"], ["c", "d"]]
    assert [shard.file_name for shard in planned] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [shard.num_bytes for shard in planned] == [20, 180, 28]
    assert [shard.file_name for shard in plan_shards(tensors, max_bytes=228)] == ["model.safetensors"]


Tensors = dict[str, torch.Tensor]
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def work_for(root: Path, models: dict[str, Tensors], variants: Sequence[Variant], **settings) -> tuple[Shard, Work]:
    """One shard with all tensors, in the instruct model's dtypes."""
    files = {}
    for role, tensors in models.items():
        (root / role).mkdir(parents=True)
        save_file(tensors, root / role / "model.safetensors")
        files[role] = dict.fromkeys(tensors, root / role / "model.safetensors")
    for name in ("tmp", "records", *(variant.name for variant in variants)):
        (root / "aside" / name).mkdir(parents=True)
    tensors = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in models["instruct"].items()}
    (shard,) = plan_shards(tensors, max_bytes=10**9)
    return shard, Work(files, {}, list(variants), Settings(**settings), root / "aside")


def variants_for(*methods: str, ratio: float = 0.3, tensors: Sequence[str] = ("a",)) -> list[Variant]:
    return [Variant(method, f"{ratio:g}", dict.fromkeys(tensors, ratio)) for method in methods]


def test_written_files_are_what_safetensors_itself_reads(tmp_path, monkeypatch):
    """Mixed dtypes, a scalar, an empty tensor, an odd length, and tensors of several pieces."""
    monkeypatch.setattr(shards, "PIECE", 12)
    tensors = {
        "odd": torch.randn(3).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "matrix": torch.randn(7, 5),
        "long": torch.randn(50).to(torch.float16),
    }
    variants = variants_for("interpolate", "slerp", ratio=0.0, tensors=list(tensors))
    shard, work = work_for(tmp_path, {"instruct": tensors, "coarse": tensors}, variants)
    merge_shard(shard, work)
    for variant in variants:
        loaded = load_file(work.aside / variant.name / "model.safetensors")
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
    assert list((work.aside / "tmp").iterdir()) == []


def random_models(*shape: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensors]:
    generator = torch.Generator().manual_seed(0)
    return {role: {"a": torch.randn(shape, generator=generator).to(dtype)} for role in ("instruct", "coarse", "base")}


@pytest.mark.parametrize("method", ROLES)
def test_files_hold_what_the_methods_give_however_a_tensor_is_cut(tmp_path, monkeypatch, method):
    models = random_models(50, 7)
    outputs = []
    for piece in (1 << 17, 64):
        monkeypatch.setattr(shards, "PIECE", piece)
        shard, work = work_for(tmp_path / str(piece), models, variants_for(method), coarse_density=0.4, seed=3)
        merge_shard(shard, work)
        outputs.append((work.aside / f"{method}-0.3" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    if method in ("residue", "interpolate", "task_arithmetic"):
        scratch = {name: torch.empty(350) for name in (*models, "delta_i", "delta_c")}
        wide = widen({role: tensors["a"].flatten() for role, tensors in models.items()}, scratch)
        expected = merge_piece(method, wide, 0.3, Settings(), Whole(), {}).to(torch.bfloat16)
        fine = load_file(work.aside / f"{method}-0.3" / "model.safetensors")["a"]
        assert torch.equal(fine.flatten(), expected)


def test_a_tensor_has_its_own_ratio(tmp_path):
    models = {
        role: {"a": torch.tensor([value]), "b": torch.tensor([value])}
        for role, value in [("instruct", 1.0), ("coarse", 5.0)]
    }
    shard, work = work_for(tmp_path, models, [Variant("interpolate", "late", {"a": 0.25, "b": 0.75})])
    merge_shard(shard, work)
    loaded = load_file(work.aside / "interpolate-late" / "model.safetensors")
    assert (loaded["a"].tolist(), loaded["b"].tolist()) == ([2.0], [4.0])


@pytest.mark.parametrize("method", ROLES)
def test_rows_follow_their_tokens_and_those_of_added_tokens_are_kept(tmp_path, method):
    """Instruct has tokens p, q, new and a padding row; coarse has q, p; base x, p, q. The same as without all that."""
    models = random_models(2, 5, dtype=torch.float32)
    shard, work = work_for(tmp_path / "plain", models, variants_for(method), coarse_density=0.5)
    merge_shard(shard, work)
    expected = load_file(work.aside / f"{method}-0.3" / "model.safetensors")["a"]
    added = torch.tensor([[-0.0, 1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0, 5.0]])
    spread = {
        "instruct": {"a": torch.cat([models["instruct"]["a"], added])},
        "coarse": {"a": models["coarse"]["a"].flip(0)},
        "base": {"a": torch.cat([torch.full((1, 5), 1e3), models["base"]["a"]])},
    }
    shard, work = work_for(tmp_path / "spread", spread, variants_for(method), coarse_density=0.5)
    work.rows["a"] = {"coarse": torch.tensor([1, 0, -1, -1]), "base": torch.tensor([1, 2, -1, -1])}
    merge_shard(shard, work)
    fine = load_file(work.aside / f"{method}-0.3" / "model.safetensors")["a"]
    assert torch.equal(fine[:2], expected)
    assert fine[2:].view(torch.int32).tolist() == added.view(torch.int32).tolist()
    record = json.loads((work.aside / "records" / "model.safetensors.json").read_text())
    delta = (models["coarse"]["a"] - models["base"]["a"]).norm().item()
    assert record["sums"]["a"][0] == pytest.approx(delta**2, rel=1e-6)


@pytest.mark.parametrize("methods", [("residue", "interpolate"), ("residue", "slerp", "ties", "dare")])
def test_inputs_are_read_once_however_many_outputs(tmp_path, monkeypatch, methods):
    read: dict[Path, list[range]] = {}

    def counting(self: InputFile, start: int, view: memoryview) -> None:
        read.setdefault(self.path, []).append(range(start, start + len(view)))
        plain(self, start, view)

    plain = InputFile.read
    monkeypatch.setattr(InputFile, "read", counting)
    monkeypatch.setattr(shards, "PIECE", 8)
    models = {role: {"a": torch.rand(9, 3), "b": torch.rand(5)} for role in ("base", "coarse", "instruct")}
    variants = [v for ratio in (0.0, 0.3, 0.6) for v in variants_for(*methods, ratio=ratio, tensors=("a", "b"))]
    shard, work = work_for(tmp_path, models, variants)
    merge_shard(shard, work)
    assert len(read) == 3
    for path, ranges in read.items():
        data = path.stat().st_size - 128  # 32 elements
        assert sorted(byte for r in ranges for byte in r) == list(range(data, data + 128))


def test_the_record_holds_digests_and_the_sums_of_the_diagnosis(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 1)
    names = ["model.layers.0.a", "model.layers.0.b", "model.layers.1.a", "model.norm.weight"]
    # coarse - base and instruct - base of each tensor
    deltas = [([3.0, 0.0], [1.0, 0.0]), ([0.0, 4.0], [0.0, 2.0]), ([1.0, 1.0], [1.0, -1.0]), ([0.0, 0.0], [1.0, 0.0])]
    models = {
        "base": {name: torch.tensor([1.0, 1.0]) for name in names},
        "coarse": {
            name: torch.tensor([1.0, 1.0]) + torch.tensor(c) for name, (c, _) in zip(names, deltas, strict=True)
        },
        "instruct": {
            name: torch.tensor([1.0, 1.0]) + torch.tensor(i) for name, (_, i) in zip(names, deltas, strict=True)
        },
    }
    shard, work = work_for(tmp_path, models, variants_for("residue", tensors=names))
    merge_shard(shard, work)
    record = json.loads((work.aside / "records" / "model.safetensors.json").read_text())
    written = (work.aside / "residue-0.3" / "model.safetensors").read_bytes()
    assert record["files"] == {"residue-0.3": xxh3_128(written).hexdigest()}
    coarse = torch.tensor([4.0, 1.0]).numpy().tobytes()
    assert record["inputs"]["coarse"]["model.layers.0.a"] == xxh3_128(coarse).hexdigest()
    rows = {
        row["name"]: (row["residue_norm"], row["instruct_norm"], row["cosine"]) for row in diagnose([record])["rows"]
    }
    assert list(rows) == ["layer 0", "layer 1", "norm", "all"]
    assert rows["layer 0"] == pytest.approx((5.0, 5**0.5, (3 + 8) / (5 * 5**0.5)))
    assert rows["layer 1"] == pytest.approx((2**0.5, 2**0.5, 0.0))
    assert rows["norm"] == (0.0, 1.0, None)
    assert rows["all"] == pytest.approx((27**0.5, 8**0.5, 11 / (27 * 8) ** 0.5))


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    models = {"instruct": {"a": torch.tensor([1.0, 60000.0])}, "coarse": {"a": torch.tensor([1.0, 80000.0])}}
    models["instruct"]["a"] = models["instruct"]["a"].half()
    _, work = work_for(tmp_path, models, variants_for("interpolate", ratio=0.5))
    with pytest.raises(C2FError, match=r"interpolate-0\.5 has values in a that are not finite in float16"):
        merge_shard(Shard("model.safetensors", {"a": ("F16", (2,))}), work)
    assert [path.name for path in work.aside.rglob("*") if path.is_file()] == []


def test_an_input_cut_after_it_was_checked_is_named(tmp_path):
    shard, work = work_for(tmp_path, random_models(300, 7), variants_for("residue"))
    cut = tmp_path / "coarse" / "model.safetensors"
    size = cut.stat().st_size - 100
    with cut.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(C2FError, match=rf"{cut} ends at byte {size}, before its tensors do: copy it again"):
        merge_shard(shard, work)
    assert [path.name for path in work.aside.rglob("*") if path.is_file()] == []


def test_a_full_disk_is_an_error_that_leaves_no_file(tmp_path):
    shard, work = work_for(tmp_path, random_models(300, 70), variants_for("residue", "interpolate"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(C2FError, match=r"files may not be so large: not all could be written into \S+aside"):
            merge_shard(shard, work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in work.aside.rglob("*") if path.is_file()] == []
    merge_shard(shard, work)
    assert sorted(path.parent.name for path in work.aside.rglob("*.safetensors")) == ["interpolate-0.3", "residue-0.3"]
