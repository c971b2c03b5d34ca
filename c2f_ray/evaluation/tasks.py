"""General tasks by EleutherAI's lm-eval, through its own Hugging Face or vLLM backend.

lm_eval, which is an optional dependency, is imported inside the functions.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from c2f_ray.data.atomic import write_text
from c2f_ray.data.model_folder import stamp
from c2f_ray.errors import C2FError, RecipeError
from c2f_ray.evaluation.likelihood import Forward
from c2f_ray.recipe import GeneralTask, LmEval

MEAN = "tasks"


def task_column(task: GeneralTask) -> str:
    return f"task/{task.name}"


def check_tasks(settings: LmEval) -> None:
    """Raises RecipeError when lm-eval, the folder of tasks or a task is not there."""
    if find_spec("lm_eval") is None:
        raise RecipeError("evaluate.lm_eval: lm-eval is not installed; install c2f-ray[tasks]")
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise RecipeError(f"evaluate.lm_eval.include_path: {settings.include_path}: no such folder")
    known = set(_task_manager(settings).all_tasks)
    unknown = [task.name for task in settings.tasks if task.name not in known]
    if unknown:
        where = f", nor is it in {settings.include_path}" if settings.include_path else ""
        raise RecipeError(*(f"evaluate.lm_eval.tasks: {name}: lm-eval has no such task{where}" for name in unknown))


def _task_manager(settings: LmEval) -> Any:
    """Of the recipe's own folder where that has all tasks: lm-eval's own are 15,000 files to read."""
    from lm_eval.tasks import TaskManager

    if settings.include_path is not None:
        own = TaskManager(include_path=settings.include_path, include_defaults=False)
        if {task.name for task in settings.tasks} <= set(own.all_tasks):
            return own
    return TaskManager(include_path=settings.include_path)


def run_tasks(folder: str, forward: Forward, memory: float, settings: LmEval, saved: Path) -> dict[str, Any]:
    """What lm-eval finds of a model in each task, by the task's name; each is in the folder `saved` when it is done,
    and is then not done again.
    """
    import lm_eval

    found: dict[str, Any] = {}
    model = manager = None
    for task in settings.tasks:
        path = saved / f"{task.name}-{task.few_shot}.json"
        if not path.exists():
            manager = manager or _task_manager(settings)
            model = model or _backend(folder, forward, memory, settings)
            result: Any = lm_eval.simple_evaluate(
                model=model,
                tasks=[task.name],
                num_fewshot=task.few_shot,
                limit=settings.limit,
                apply_chat_template=settings.chat_template,
                task_manager=manager,
                log_samples=False,
            )
            kept = {key: result[key] for key in ("results", "versions", "n-shot", "n-samples", "lm_eval_version")}
            write_text(path, json.dumps(kept, indent=1, default=str))
        found[task.name] = json.loads(path.read_text())["results"][task.name]
    return found


def _backend(folder: str, forward: Forward, memory: float, settings: LmEval) -> Any:
    loaded: dict[str, Any] = {"pretrained": folder, "dtype": forward.dtype}
    if forward.gpus:
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(**loaded, tensor_parallel_size=forward.gpus, gpu_memory_utilization=memory)
    from lm_eval.models.huggingface import HFLM

    return HFLM(**loaded, device="cpu", batch_size=settings.batch_size)


def task_metrics(settings: LmEval, found: dict[str, Any]) -> dict[str, float]:
    """The metric that the recipe names of each task, and their mean. Raises C2FError when a task has it not."""
    metrics: dict[str, float] = {}
    for task in settings.tasks:
        key = task.metric if "," in task.metric else f"{task.metric},none"
        if key not in found[task.name]:
            has = ", ".join(name.removesuffix(",none") for name in found[task.name] if "," in name)
            raise C2FError(f"evaluate.lm_eval.tasks: {task.name}: no metric {task.metric!r}; it has {has}")
        metrics[task_column(task)] = float(found[task.name][key])
    return {MEAN: fmean(metrics.values()), **metrics}


def tasks_stamp(settings: LmEval) -> list[Any]:
    """What results depend on besides the model."""
    folder = Path(settings.include_path) if settings.include_path else None
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return [settings.limit, settings.chat_template, [stamp(path) for path in files]]
