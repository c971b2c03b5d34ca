"""The merge against mergekit and against the disk: `python benchmarks/merge.py`.

Three random Mistrals of 2 GB of bfloat16 in all are merged by `residue`, which mergekit calls task arithmetic. What is
timed is the job alone: Ray and its two workers are up, and mergekit is imported. Whole commands, each with its start,
are timed once beside that. "Plain" reads the same input bytes and writes as many as the outputs have, in two threads,
in blocks of 1 MiB, without looking at them. Inputs are dropped from the page cache before each run, and outputs are on
the disk (fsync) at its end, on all sides; mergekit's are synced for it. Sides take turns, in another order each round,
and a goal's figure is the median of the rounds' own ratios. Processor seconds, which depend less on who else uses the
machine, are given beside the wall times: user and system, without what the kernel's own threads write back.

Memory is the proportional set size of all processes of a side, less what they had before the job began, in a run that
is not timed. For ours that leaves out Ray itself, which is given beside it.

mergekit 0.1.5 is taken from MERGEKIT_PYTHON, or installed into `.cache/mergekit` (LGPL: only run, never imported here).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil
import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "merge.json"
ROLES = ("base", "coarse", "instruct")
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5]
ROUNDS = 3
WORKERS = 2
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 3584, 18, 32000
BLOCK = 1 << 20
ENVIRONMENT = {**os.environ, "RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

OURS = """
import json, os, sys, time
import ray
from c2f_ray.merging.job import run_merge
from c2f_ray.merging.plan import check_merge
from c2f_ray.recipe import load_recipe

ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=1)
def warm():
    import c2f_ray.merging.shards
    time.sleep(1)
    return os.getpid()

workers = set(ray.get([warm.remote() for _ in range(int(sys.argv[1]))]))
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    run_merge(check_merge(load_recipe(*json.loads(line))))
    print(time.perf_counter() - began, flush=True)
"""
MERGEKIT = """
import json, os, sys, time
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

print("ready", flush=True)
for line in sys.stdin:
    config, folder = json.loads(line)
    began = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(config), out_path=folder, options=MergeOptions(cuda=False))
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    print(time.perf_counter() - began, flush=True)
"""


class Side:
    """A process that is told what to merge and says how many seconds it took; its memory and time are watched."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._answer("ready")
        self.idle_mib = tree_pss_mib(self.process.pid)
        self.peak_mib = self.idle_mib

    def run(self, told: object) -> tuple[float, float]:
        """Wall and processor seconds."""
        before = tree_cpu_seconds(self.process.pid)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return float(self._answer("seconds")), tree_cpu_seconds(self.process.pid) - before

    def run_watched(self, told: object) -> None:
        """The same, with an eye on its memory, which takes much of a core: its seconds do not count."""
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,))
        watcher.start()
        self.run(told)
        done.set()
        watcher.join()

    def close(self) -> None:
        self.process.communicate(timeout=60)

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(0.1):
            self.peak_mib = max(self.peak_mib, tree_pss_mib(self.process.pid))

    def _answer(self, what: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if what == "ready" and line.strip() == what:
                return line
            if what == "seconds" and line.strip().replace(".", "", 1).isdigit():
                return line
        sys.exit(f"{' '.join(self.process.args[:1])} ended before it said {what}")


def tree_pss_mib(pid: int) -> float:
    total = 0
    parent = psutil.Process(pid)
    for member in [parent, *parent.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


def tree_cpu_seconds(pid: int) -> float:
    parent = psutil.Process(pid)
    times = [member.cpu_times() for member in [parent, *parent.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


def make_models(folder: Path) -> None:
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    from c2f_ray.tiny.tokenizer import policy_tokenizer

    for seed, role in enumerate(ROLES):
        policy_tokenizer(with_template=True).save_pretrained(folder / role)
        (folder / role / "config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / role / "model.safetensors", metadata={"format": "pt"})


def drop_cache(folder: Path) -> None:
    """Write back what is dirty, and forget the inputs."""
    os.sync()
    for role in ROLES:
        with (folder / role / "model.safetensors").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(folder: Path, out: Path, num_outputs: int) -> tuple[float, float]:
    """Read every input byte once and write the outputs' bytes once: a half of each in each thread."""
    out.mkdir()
    size = (folder / "base" / "model.safetensors").stat().st_size
    began, cpu_began = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(WORKERS) as pool:
        part = size // WORKERS
        list(
            pool.map(
                _copy,
                *zip(
                    *[(folder, out / str(i), i * part, (i + 1) * part, num_outputs) for i in range(WORKERS)],
                    strict=True,
                ),
            )
        )
    return time.perf_counter() - began, time.process_time() - cpu_began


def _copy(folder: Path, out: Path, start: int, stop: int, num_outputs: int) -> None:
    inputs = [(folder / role / "model.safetensors").open("rb", buffering=0) for role in ROLES]
    outputs = [out.with_suffix(f".{i}").open("wb", buffering=0) for i in range(num_outputs)]
    block = bytearray(BLOCK)
    for at in range(start, stop, BLOCK):
        for file in inputs:
            os.preadv(file.fileno(), [block], at)
        for file in outputs:
            file.write(memoryview(block)[: min(BLOCK, stop - at)])
    for file in outputs:
        os.fsync(file.fileno())
    for file in (*inputs, *outputs):
        file.close()


def mergekit_python() -> str:
    if "MERGEKIT_PYTHON" in os.environ:
        return os.environ["MERGEKIT_PYTHON"]
    environment = ROOT / ".cache" / "mergekit"
    python = environment / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pins = ["mergekit==0.1.5", f"torch=={version('torch').partition('+')[0]}"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
    return str(python)


def recipe_of(folder: Path, name: str, ratios: list[float]) -> list[str]:
    models = {role: str(folder / role) for role in ROLES}
    section = json.dumps(models | {"methods": ["residue"], "ratios": ratios})
    return [str(ROOT / "configs" / "tiny.yaml"), f"run.folder={folder}", f"run.name={name}", f"merge={section}"]


def mergekit_config(folder: Path, ratio: float) -> dict[str, object]:
    weighted = [(role, weight) for role, weight in (("instruct", 1.0), ("coarse", ratio))]
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / role), "parameters": {"weight": weight}} for role, weight in weighted],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def command_seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT, timeout=600)
    os.sync()
    return time.perf_counter() - began


def main() -> None:
    python = mergekit_python()
    folder = Path(tempfile.mkdtemp(prefix="c2f-merge-"))
    seconds: dict[str, list[tuple[float, float]]] = {
        side: [] for side in ("ours", "mergekit", "plain", "ours_5", "plain_5")
    }
    load = []
    try:
        make_models(folder)
        input_bytes = sum((folder / role / "model.safetensors").stat().st_size for role in ROLES)
        drop_cache(folder)
        commands = {
            "ours": command_seconds(sys.executable, "-m", "c2f_ray", "merge", *recipe_of(folder, "out", RATIOS[:1]))
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(mergekit_config(folder, RATIOS[0])))
        drop_cache(folder)
        yaml_command = str(Path(python).parent / "mergekit-yaml")
        commands["mergekit"] = command_seconds(yaml_command, str(folder / "config.yaml"), str(folder / "out2"))
        for name in ("out", "out2"):
            shutil.rmtree(folder / name)
        ours, mergekit = Side(sys.executable, "-c", OURS, str(WORKERS)), Side(python, "-c", MERGEKIT)
        one_ratio = recipe_of(folder, "out", RATIOS[:1])
        same = [mergekit_config(folder, RATIOS[0]), str(folder / "out")]
        for side, told in ((ours, one_ratio), (mergekit, same)):  # warm as well
            side.run_watched(told)
            shutil.rmtree(folder / "out")
        for i in range(ROUNDS):
            load.append(os.getloadavg()[0])
            runs = {
                "ours": lambda: ours.run(one_ratio),
                "mergekit": lambda: mergekit.run(same),
                "plain": lambda: plain(folder, folder / "out", 1),
                "ours_5": lambda: ours.run(recipe_of(folder, "out", RATIOS)),
                "plain_5": lambda: plain(folder, folder / "out", len(RATIOS)),
            }
            sides = list(runs)
            for side in sides[i:] + sides[:i]:
                drop_cache(folder)
                seconds[side].append(runs[side]())
                print(f"{side}: {seconds[side][-1][0]:.2f} s", flush=True)
                shutil.rmtree(folder / "out")
        ours.close()
        mergekit.close()
    finally:
        shutil.rmtree(folder)
    report(seconds, commands, ours, mergekit, input_bytes, load)


def spread(taken: list[float]) -> dict[str, float]:
    return {"minimum": round(min(taken), 2), "median": round(median(taken), 2), "maximum": round(max(taken), 2)}


def report(
    seconds: dict[str, list[tuple[float, float]]],
    commands: dict[str, float],
    ours: Side,
    mergekit: Side,
    input_bytes: int,
    load: list[float],
) -> None:
    wall = {side: [taken[0] for taken in times] for side, times in seconds.items()}
    cpu = {side: [taken[1] for taken in times] for side, times in seconds.items()}
    rounds = [dict(zip(wall, times, strict=True)) for times in zip(*wall.values(), strict=True)]
    ours_mib, mergekit_mib = ours.peak_mib - ours.idle_mib, mergekit.peak_mib - mergekit.idle_mib
    ratios = {
        "wall_over_mergekit": (median(r["ours"] / r["mergekit"] for r in rounds), 1 / 3),
        "wall_over_plain": (median(r["ours"] / r["plain"] for r in rounds), 1.25),
        "more_for_5_ratios_over_plain": (
            median((r["ours_5"] - r["ours"]) / (r["plain_5"] - r["plain"]) for r in rounds),
            1.0,
        ),
        "memory_over_mergekit": (ours_mib / mergekit_mib, 1 / 4),
    }
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {package: version(package) for package in ("ray", "torch", "safetensors")} | {"mergekit": "0.1.5"},
        "input_gib": round(input_bytes / 2**30, 2),
        "load_average": {"minimum": round(min(load), 1), "maximum": round(max(load), 1)},
        "seconds": {side: spread(taken) for side, taken in wall.items()},
        "processor_seconds": {side: spread(taken) for side, taken in cpu.items()},
        "seconds_of_the_whole_command": {side: round(taken, 1) for side, taken in commands.items()},
        "peak_memory_mib": {
            name: {"of_the_job": round(side.peak_mib - side.idle_mib), "before_it": round(side.idle_mib)}
            for name, side in (("ours", ours), ("mergekit", mergekit))
        },
        "goals": {
            name: {"measured": round(measured, 3), "goal": round(goal, 3)} for name, (measured, goal) in ratios.items()
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    for name, (measured, goal) in ratios.items():
        print(f"goal {name}: {measured:.2f} (<= {goal:.2f}) {'ok' if measured <= goal else 'missed'}")


if __name__ == "__main__":
    main()
