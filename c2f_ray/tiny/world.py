"""Building the embedded world: folders that look like the real thing, trained from text made here.

Invariants: the folder is complete or it is not there (built aside, then renamed), and a complete one is reused only if
the settings and the code that made it are the same. This module imports without torch; training happens in processes
of its own.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from c2f_ray.errors import C2FError
from c2f_ray.tiny.settings import Effort, Settings, make_settings
from c2f_ray.tiny.task import derived, draw_question

Progress = Callable[[str, float], None]
STAGE_TIMEOUT_S = 1200.0


class WorldError(C2FError, RuntimeError):
    """The world could not be built; the message ends with the failing stage's own words."""


def build_world(folder: Path, seed: int = 0, effort: Effort = "full", progress: Progress | None = None) -> Path:
    """Write `folder`/{base,instruct,reward,pair_policy,pair_reference,prompts}/ and world.json, and return `folder`.

    "full" trains for about two minutes on two cores and passes gates; "smoke" makes the same layout in seconds with
    models that know nothing. `progress(stage, fraction)` may be called from several threads. Raises WorldError when a
    stage fails or a gate is missed, and FileExistsError rather than replace a folder that is no world.
    """
    folder = Path(folder)
    settings = make_settings(seed, effort)
    digest = settings.digest()
    if (folder / "world.json").exists():
        if json.loads((folder / "world.json").read_text())["digest"] == digest:
            return folder
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no world.json: give another folder, or empty it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        began = time.monotonic()
        write_prompts(aside / "prompts", settings)
        stages = train_stages(aside, settings, progress or (lambda stage, fraction: None))
        record = {
            "digest": digest,
            "settings": asdict(settings),
            "stages": stages,
            "seconds": round(time.monotonic() - began, 1),
        }
        (aside / "world.json").write_text(json.dumps(record, indent=2) + "\n")
        aside.chmod(0o755)  # mkdtemp's 0700 would lock other users of a shared disk out
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def write_prompts(folder: Path, settings: Settings) -> None:
    """`train.jsonl` and `heldout.jsonl`, distinct questions of the two splits, and `texts.jsonl`, held-out answers."""
    folder.mkdir()
    rng = random.Random(f"texts {settings.seed}")
    texts = [(draw_question(rng, heldout=True), rng.randint(0, 2)) for _ in range(settings.heldout_prompts)]
    lines = [f"Q:{question.content}\nA:" + "\n".join(derived(question, checks)) for question, checks in texts]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for split, count in (("train", settings.train_prompts), ("heldout", settings.heldout_prompts)):
        rng = random.Random(f"prompts {split} {settings.seed}")
        questions: dict[str, dict[str, object]] = {}
        while len(questions) < count:
            question = draw_question(rng, heldout=split == "heldout")
            if question.content in questions:
                continue
            questions[question.content] = {
                "id": f"{split}-{len(questions):05d}",
                "messages": [{"role": "user", "content": question.content}],
                "answer": question.answer,
                "depth": question.depth,
            }
        lines = [json.dumps(record) + "\n" for record in questions.values()]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def train_stages(folder: Path, settings: Settings, progress: Progress) -> dict[str, dict[str, float]]:
    """Each stage's seconds and gate numbers. The base comes first; the others then train side by side."""
    if settings.effort == "smoke":  # one process: imports cost more than the steps
        return run_process(folder, settings, ["base", "instruct", "reward", "pair"], 1, progress)
    results = run_process(folder, settings, ["base"], 2, progress)
    with ThreadPoolExecutor(2) as pool:
        side_by_side = (["instruct", "pair"], ["reward"])
        jobs = [pool.submit(run_process, folder, settings, stages, 1, progress) for stages in side_by_side]
        for job in jobs:
            results |= job.result()
    return results


def run_process(
    folder: Path, settings: Settings, stages: list[str], num_threads: int, progress: Progress
) -> dict[str, dict[str, float]]:
    """Train stages in a process with `num_threads` torch threads; its JSON lines become progress and results."""
    command = [sys.executable, "-m", "c2f_ray.tiny.train", str(folder), json.dumps(asdict(settings)), str(num_threads)]
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(num_threads),
        # Threads that spin long take turns with busy neighbours (20 times slower was seen); not to spin costs half.
        "GOMP_SPINCOUNT": "20000",
        "CUDA_VISIBLE_DEVICES": "",  # the world is the same with and without a GPU
    }
    results: dict[str, dict[str, float]] = {}
    log = folder / f"{stages[0]}.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command + stages, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as process,
    ):
        deadline = threading.Timer(STAGE_TIMEOUT_S, process.kill)
        began = time.monotonic()
        deadline.start()
        try:
            for line in process.stdout or ():
                if not line.startswith("{"):  # a library's own chatter
                    continue
                message = json.loads(line)
                progress(message["stage"], message["fraction"])
                if "result" in message:
                    results[message["stage"]] = message["result"]
        except BaseException:  # Ctrl-C too: a stage must not go on training for nobody
            process.kill()
            raise
        finally:
            deadline.cancel()
    if process.returncode != 0:
        late = time.monotonic() - began >= STAGE_TIMEOUT_S
        why = f"not done after {STAGE_TIMEOUT_S:g} s" if late else log.read_text().strip()[-2000:]
        raise WorldError(f"training {', '.join(stages)} failed: {why}")
    log.unlink()
    return results
