"""The evaluation job: base, instruct, coarse and every fine actor side by side, and the choice among the fine ones."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import ray

from c2f_ray.adapters.vllm import engine_env
from c2f_ray.data.atomic import replacing, write_text
from c2f_ray.data.inputs import with_absolute_folders
from c2f_ray.data.model_folder import absolute_folder
from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.texts import Columns, text_rows, write_rows
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.errors import BadRewardError
from c2f_ray.evaluation.answers import (
    Server,
    Shards,
    answers_path,
    converse,
    greedy,
    kept_name,
    truncate,
    truncated_info,
)
from c2f_ray.evaluation.check import BEST, Candidate, EvaluationPlan, check_evaluate, load_grader, record_of
from c2f_ray.evaluation.choosing import Choice, choose
from c2f_ray.evaluation.judging import mt_bench, win_rates
from c2f_ray.evaluation.likelihood import Forward, likelihoods
from c2f_ray.evaluation.metrics import mean, response_metrics
from c2f_ray.evaluation.tasks import run_tasks, task_metrics, tasks_stamp
from c2f_ray.recipe import EndpointJudge, LmEval, Recipe
from c2f_ray.recipe.roles import evaluate_roles
from c2f_ray.reward.rewards import Rewards, ScoredShard
from c2f_ray.runtime.session import ray_session
from c2f_ray.runtime.threads import thread_env
from c2f_ray.runtime.waiting import in_turn, wait_for
from c2f_ray.watch.progress import Progress

Models = dict[str, dict[str, Any]]  # name to folder and metrics, a row of the table


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Evaluates the run's models. Returns, and writes as `evaluation.json`, their metrics and the rule's verdicts.

    Responses go to `evaluation/NAME.parquet`; the best fine actor is linked as `fine/best`.
    Raises RecipeError when something is missing, with nothing written.
    """
    recipe = with_absolute_folders(recipe)
    plan = check_evaluate(recipe)
    with ray_session(recipe, evaluate_roles(recipe)), Progress(len(plan.candidates)) as progress:
        models, shards = _respond(recipe, plan, progress)
        if plan.settings.perplexity or plan.settings.kl_to_instruct:
            progress.stage("measuring likelihoods")
            for name, found in _likelihoods(recipe, plan, shards):
                models[name]["metrics"] |= found
        if plan.settings.lm_eval:
            progress.stage("running general tasks")
            for name, found in general_tasks(recipe, plan.settings.lm_eval, plan.candidates, plan.folder):
                models[name]["metrics"] |= found
        judged = _judge(recipe, plan, models, progress)
    choice = Choice(None, {})
    if plan.settings.choose:
        metrics = {name: model["metrics"] for name, model in models.items()}
        choice = choose(plan.settings.choose, metrics, [model.name for model in plan.candidates if model.fine])
    result = {
        "max_tokens": plan.settings.max_tokens,
        "models": [{"name": name, **model} for name, model in models.items()],
        "best": choice.best,
        "verdicts": choice.verdicts,
        **judged,
    }
    write_text(plan.folder / "evaluation.json", json.dumps(result, indent=1))
    link_best(plan.folder / "fine", choice.best)
    return result


def link_best(fine: Path, best: str | None) -> None:
    """`fine/best` leads to the fine actor that was chosen, wherever the run's folder is moved; or is not there."""
    if best is None:
        (fine / BEST).unlink(missing_ok=True)
        return
    with replacing(fine / BEST) as link:
        link.symlink_to(best)


def _respond(recipe: Recipe, plan: EvaluationPlan, progress: Progress) -> tuple[Models, dict[str, list[Any]]]:
    """What every model's greedy responses to the held-out prompts are worth, and references to them by model.

    Its answers to what it is judged by are saved.
    """
    settings, models = plan.settings, Models()
    responses: dict[str, list[Any]] = {}
    tokenizer, timeout_s = recipe.policy.model, recipe.rollout.timeout_s
    with ExitStack() as stack:
        progress.stage("starting the actors")
        pools = Rewards(recipe.reward, recipe.cluster, tokenizer, ray.put(plan.asked), ordered=True)
        rewards = stack.enter_context(closing(pools))
        server = stack.enter_context(closing(Server(recipe, settings)))
        rewards.wait_until_ready()

        def graded(name: str, path: Path, prompts: Any, shards: Shards, grader: str | None) -> dict[str, Any]:
            asked = [
                rewards.submit(shard, info.prompt_tokens + info.response_tokens, info.finished)
                for shard, info in shards
            ]
            columns = [all_scored(name, shard).columns() for shard in rewards.collect(asked)]
            refs = [shard for shard, _ in shards]
            task = grade.remote(path, tokenizer, prompts, refs, columns, grader, timeout_s)
            return wait_for(task, timeout_s, f"the task that grades {name}")

        for number, candidate in enumerate(plan.candidates, start=1):
            progress.stage(f"evaluating {candidate.name}")
            prompts = ray.put(candidate.prompts)
            server.load(candidate.folder, ray.put(candidate.prompts.tokens))
            shards = server.answer(greedy(plan.rows["heldout"]))
            variants = {candidate.name: shards}
            if candidate.name == "coarse" and plan.limit < settings.max_tokens:
                # Greedy decoding: what a lower limit would have given is the beginning of what this one gave.
                variants[f"coarse@{plan.limit}"] = [
                    (truncate.remote(shard, plan.limit), truncated_info(info, plan.limit)) for shard, info in shards
                ]
            for name, its_shards in variants.items():
                path = plan.folder / "evaluation" / f"{name}.parquet"
                metrics = graded(name, path, prompts, its_shards, settings.accuracy)
                models[name] = {"folder": candidate.folder, "metrics": metrics}
            responses[candidate.name] = [shard for shard, _ in shards]
            if settings.win_rate and not (path := answers_path(recipe, plan, "win_rate", candidate)).exists():
                graded(candidate.name, path, prompts, server.answer(greedy(plan.rows["win_rate"])), None)
            if settings.mt_bench and not (path := answers_path(recipe, plan, "mt_bench", candidate)).exists():
                saved = converse(recipe, plan, server, candidate, path)
                wait_for(saved, timeout_s, f"the task that saves the answers of {candidate.name}")
            progress.step({"step": number, "reward/mean": models[candidate.name]["metrics"]["reward"]})
    return models, responses


def all_scored(name: str, shard: ScoredShard) -> ScoredShard:
    """Refuses to compare models by what some of their responses got."""
    for cause in shard.causes.values():
        raise BadRewardError(f"a response of {name} got no reward: {cause}")
    return shard


def _likelihoods(
    recipe: Recipe, plan: EvaluationPlan, shards: dict[str, list[Any]]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Perplexity and KL of every model, on the GPUs or the CPUs that the engines have left."""
    timeout_s = plan.settings.timeout_s
    task, forward = _task(likelihoods, recipe), _forward(recipe)
    instruct = plan.instruct if plan.settings.kl_to_instruct else None
    windows = ray.put(plan.windows)
    starts = {
        model.name: partial(task.remote, model.folder, instruct, forward, windows, shards[model.name], timeout_s)
        for model in plan.candidates
    }
    return in_turn(starts, recipe.rollout.actors, timeout_s, "the forwards of")


def general_tasks(
    recipe: Recipe, settings: LmEval, candidates: list[Candidate], folder: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """The metrics of lm-eval's tasks of every model, on the GPUs or the CPUs that the engines have left."""
    task, forward, memory = _task(run_tasks, recipe), _forward(recipe), recipe.rollout.memory
    kept = folder / "evaluation" / "tasks"
    if settings.include_path is not None:  # a task's working directory need not be the driver's
        settings = settings.model_copy(update={"include_path": absolute_folder(settings.include_path)})
    stamp = [recipe.policy.dtype, *tasks_stamp(settings)]
    starts = {
        model.name: partial(task.remote, model.folder, forward, memory, settings, kept / kept_name(model, stamp))
        for model in candidates
    }
    for name, found in in_turn(starts, recipe.rollout.actors, settings.timeout_s, "the general tasks of"):
        yield name, task_metrics(settings, found)


def _task(function: Any, recipe: Recipe) -> Any:
    """The function as a Ray task that takes what an engine took."""
    gpus = recipe.rollout.gpus_per_actor
    env = engine_env(gpus) if gpus else thread_env(recipe.rollout.threads, recipe.rollout.actors)
    return ray.remote(function).options(num_gpus=gpus, num_cpus=0 if gpus else 1, runtime_env={"env_vars": env})


def _forward(recipe: Recipe) -> Forward:
    return Forward(recipe.policy.dtype, recipe.rollout.gpus_per_actor, recipe.learner.tokens_per_microbatch)


def _judge(recipe: Recipe, plan: EvaluationPlan, models: Models, progress: Progress) -> dict[str, Any]:
    """The judge's figures by model; the one that sums them up joins the model's metrics."""
    settings, judged = plan.settings, dict[str, Any]()

    def answers(part: str) -> dict[str, Path]:
        return {model.name: answers_path(recipe, plan, part, model) for model in plan.candidates}

    judge = settings.judge.model if isinstance(settings.judge, EndpointJudge) else "the recipe's reward"
    if settings.win_rate:
        progress.stage("comparing answers")
        found = win_rates(plan, answers("win_rate"), recipe.run.seed)
        judged["win_rates"] = {"against": settings.win_rate.against, "judge": judge, "models": found}
        for name, row in found.items():
            models[name]["metrics"]["win_rate"] = row["win_rate"]
    if settings.mt_bench:
        progress.stage("scoring answers")
        found = mt_bench(plan, answers("mt_bench"))
        judged["mt_bench"] = {"judge": judge, "runs": settings.mt_bench.runs, "models": found}
        for name, row in found.items():
            models[name]["metrics"]["mt_bench"] = row["mean"]
    return judged


@ray.remote(num_cpus=0)
def grade(
    path: Path,
    tokenizer: str,
    prompts: PromptSet,
    shards: list[Any],
    columns: list[Columns],
    grader: str | None,
    timeout_s: float,
) -> dict[str, float | None]:
    """A model's metrics over its responses, which are written to `path`. `shards` are object references."""
    shards = wait_for(shards, timeout_s, "the shards to grade")
    rows = text_rows(load_tokenizer(tokenizer), prompts, shards, columns)
    tokens = {int(s.info.sample_id[i]): s.response[i].tolist() for s in shards for i in range(len(s))}
    grades_of: list[str] = []
    if grader is not None:
        function = load_grader(grader)
        for row in rows:
            grades = function(record_of(prompts, row["sample_id"]), row["response"], row["finished"])
            grades_of = list(grades)
            row.update(grades)
    write_rows(path, rows)
    responses = [tokens[row["sample_id"]] for row in rows]
    return {
        "reward": mean(row["reward"] for row in rows),
        **{column: mean(row[column] for row in rows) for column in grades_of},
        **response_metrics(responses, [row["response"] for row in rows], [row["finished"] for row in rows]),
    }
