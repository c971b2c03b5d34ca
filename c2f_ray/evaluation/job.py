"""The evaluation job: greedy responses of base, instruct, coarse and every fine actor to held-out prompts."""

import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from transformers import AutoConfig

from c2f_ray.data.prompts import PromptSet, PromptSource, build_prompt_set
from c2f_ray.data.templates import chat_template
from c2f_ray.data.texts import Columns, text_rows, write_rows
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.errors import BadRewardError, RecipeError
from c2f_ray.evaluation.metrics import mean, response_metrics
from c2f_ray.functions import load_function
from c2f_ray.preflight import (
    absolute_folder,
    check_context,
    check_model,
    check_reward,
    run_folder,
    with_absolute_folders,
)
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.schema import Evaluate
from c2f_ray.reward.rewards import Rewards, ScoredShard
from c2f_ray.rollout.pool import RolloutPool, RolloutRequest
from c2f_ray.session import evaluate_needs, ray_session
from c2f_ray.waiting import wait_for
from c2f_ray.watch.metrics import read_metrics
from c2f_ray.watch.progress import Progress

Grader = Callable[[dict[str, Any], str, bool], dict[str, float]]


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    name: str
    folder: str
    prompts: PromptSet  # rendered with its own template; the same rows for all candidates
    fine: bool


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Evaluates the run's models. Returns, and writes as `evaluation.json`, each model's metrics.

    Responses go to `evaluation/NAME.parquet`. Raises RecipeError when something is missing, with nothing written.
    """
    recipe = with_absolute_folders(recipe)
    settings, limit, candidates = check_evaluate(recipe)
    folder = run_folder(recipe)
    models: list[dict[str, Any]] = []
    with ray_session(recipe, evaluate_needs(recipe)), ExitStack() as stack:
        progress = stack.enter_context(Progress(len(candidates)))
        progress.stage("starting the actors")
        questions = ray.put(candidates[0].prompts)  # the same for all candidates
        rewards = stack.enter_context(
            closing(Rewards(recipe.reward, recipe.cluster, recipe.policy.model, questions, ordered=True))
        )
        server = stack.enter_context(closing(_Server(recipe, settings)))
        rewards.wait_until_ready()
        for number, candidate in enumerate(candidates, start=1):
            progress.stage(f"evaluating {candidate.name}")
            shards = server.answer(candidate)
            graded = {candidate.name: shards}
            if candidate.name == "coarse" and limit < settings.max_tokens:
                # Greedy decoding: what a lower limit would have given is the beginning of what this one gave.
                graded[f"coarse@{limit}"] = [
                    (truncate.remote(shard, limit), truncated_info(info, limit)) for shard, info in shards
                ]
            for name, its_shards in graded.items():
                asked = [
                    rewards.submit(shard, info.prompt_tokens + info.response_tokens, info.finished)
                    for shard, info in its_shards
                ]
                columns = [all_scored(name, shard).columns() for shard in rewards.collect(asked)]
                path = (folder / "evaluation" / f"{name}.parquet").absolute()
                prompts = ray.put(candidate.prompts)
                timeout_s = recipe.rollout.timeout_s
                refs = [shard for shard, _ in its_shards]
                task = grade.remote(path, recipe.policy.model, prompts, refs, columns, settings.accuracy, timeout_s)
                metrics = wait_for(task, timeout_s, f"the task that grades {name}")
                models.append({"name": name, "folder": candidate.folder, "metrics": metrics})
            progress.step({"step": number, "reward/mean": models[-1]["metrics"]["reward"]})
    fine = {candidate.name for candidate in candidates if candidate.fine}
    best = max((model for model in models if model["name"] in fine), key=_merit, default=None)
    result = {"max_tokens": settings.max_tokens, "models": models, "best": best and best["name"]}
    partial = folder / "evaluation.json.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(folder / "evaluation.json")
    return result


def all_scored(name: str, shard: ScoredShard) -> ScoredShard:
    """Refuses to compare models by what some of their responses got."""
    for cause in shard.causes.values():
        raise BadRewardError(f"a response of {name} got no reward: {cause}")
    return shard


def _merit(model: dict[str, Any]) -> tuple[float, float]:
    """What the best fine actor has most of: the grader's `strict`, or else its `accuracy`, and among equals reward."""
    metrics = model["metrics"]
    return metrics.get("strict", metrics.get("accuracy", 0.0)), metrics["reward"]


def check_evaluate(recipe: Recipe) -> tuple[Evaluate, int, list[Candidate]]:
    """The settings, the last limit of the run's steps, and the models that there are to evaluate, with their prompts.

    Raises RecipeError; writes nothing.
    """
    if recipe.evaluate is None:
        raise RecipeError("evaluate: missing; it names the held-out prompts")
    check_reward(recipe.reward)
    check_model("policy.model", recipe.policy.model)
    folder = run_folder(recipe)
    coarse = folder / "coarse"
    if not coarse.is_dir() or not (folder / "metrics.jsonl").is_file():
        raise RecipeError(f"run.name: {coarse}: no coarse actor there; run `c2f-ray train` with this recipe first")
    folders = {"base": recipe.policy.model}
    if recipe.merge is not None:
        folders["instruct"] = recipe.merge.instruct
    folders["coarse"] = str(coarse)
    fine = {path.name: str(path) for path in sorted((folder / "fine").glob("*")) if path.is_dir()}
    vocabulary = load_tokenizer(recipe.policy.model).get_vocab()
    prompts: dict[str, PromptSet] = {}  # by template
    candidates = []
    for name, model in (folders | fine).items():
        config = check_model("merge.instruct" if name == "instruct" else f"run.name ({name})", model)
        if load_tokenizer(model).get_vocab() != vocabulary:
            raise RecipeError(
                f"{model}: its tokenizer is not the policy's, {recipe.policy.model}; they must be the same"
            )
        limits = ("prompts.max_tokens", recipe.prompts.max_tokens, "evaluate.max_tokens", recipe.evaluate.max_tokens)
        check_context(config, *limits)
        template = _template(recipe, model)
        if template not in prompts:
            prompts[template] = _heldout_prompts(recipe, recipe.evaluate, template)
        candidates.append(Candidate(name, absolute_folder(model), prompts[template], fine=name in fine))
    if recipe.evaluate.accuracy:
        _try_grader(recipe.evaluate.accuracy, candidates[0].prompts)
    limit = read_metrics(folder / "metrics.jsonl")[-1]["length/limit"]
    assert limit is not None  # it is a whole number in every step
    return recipe.evaluate, int(limit), candidates


def _try_grader(path: str, prompts: PromptSet) -> None:
    """A grader that cannot grade an empty response would fail after all the models have answered."""
    try:
        grades = load_grader(path)(_record(prompts, 0), "", False)
        wrong = None if isinstance(grades, dict) else f"gave {grades!r}, not a dict of numbers"
    except Exception as error:  # it is the user's code
        wrong = f"fails on an empty response: {type(error).__name__}: {error}"
    if wrong:
        raise RecipeError(f"evaluate.accuracy: {path} {wrong}")


def _record(prompts: PromptSet, row: int) -> dict[str, Any]:
    """What a grader gets to know of a prompt: its record's fields, `id` and `messages`."""
    return {**prompts.records[row], "id": prompts.ids[row], "messages": prompts.messages[row]}


def load_grader(path: str) -> Grader:
    """The function that `module:name` names: (record, response, finished) to {metric: value}."""
    return load_function("evaluate.accuracy", path)


def _template(recipe: Recipe, model: str) -> str:
    """The template that the policy was trained with; another model's own, where it has one."""
    own = load_tokenizer(model).chat_template
    if model != recipe.policy.model and isinstance(own, str):
        return own
    return chat_template(recipe.policy.chat_template, load_tokenizer(recipe.policy.model))


def _heldout_prompts(recipe: Recipe, settings: Evaluate, template: str) -> PromptSet:
    source = PromptSource(
        key="evaluate.prompts",
        source=settings.prompts,
        split=settings.split,
        field=settings.field,
        system=recipe.prompts.system,
        num_prompts=settings.num_prompts,
        seed=recipe.run.seed,
    )
    # Refused, not dropped: all models must be asked the same questions.
    return build_prompt_set(
        source, load_tokenizer(recipe.policy.model), template, recipe.prompts.max_tokens, too_long="refuse"
    )


class _Server:
    """The engines, which serve all models of one architecture in turn: weights are swapped, not engines."""

    def __init__(self, recipe: Recipe, settings: Evaluate) -> None:
        self.recipe = recipe
        self.settings = settings
        self.engines: RolloutPool | None = None
        self.architecture: dict[str, Any] = {}

    def answer(self, candidate: Candidate) -> list[tuple[Any, TrajectoryInfo]]:
        """References to the shards of the candidate's greedy responses, by row of its prompts, and their infos."""
        tokens = ray.put(candidate.prompts.tokens)
        architecture = _architecture(candidate.folder)
        if self.engines is not None and architecture == self.architecture:
            self.engines.load_folder(candidate.folder, tokens)
        else:
            self.close()
            policy = self.recipe.policy.model_copy(update={"model": candidate.folder})
            recipe = self.recipe.model_copy(update={"policy": policy})
            max_model_tokens = recipe.prompts.max_tokens + self.settings.max_tokens
            self.engines = RolloutPool(recipe, tokens, max_model_tokens, load_format="auto")
            self.engines.wait_until_ready()
            self.architecture = architecture
        requests = [RolloutRequest(row, row, 0, greedy=True) for row in range(len(candidate.prompts))]
        return list(self.engines.generate(requests, self.settings.max_tokens, ordered=True))

    def close(self) -> None:
        if self.engines is not None:
            self.engines.close()
            self.engines = None


def _architecture(folder: str) -> dict[str, Any]:
    """What an engine was built for: the configuration, but for what only names or describes the model."""
    described = ("_name_or_path", "transformers_version", "dtype", "architectures")
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in described}


@ray.remote(num_cpus=0)
def truncate(shard: Trajectories, limit: int) -> Trajectories:
    """The shard as a response limit of `limit` tokens would have made it, for greedy trajectories."""
    return Trajectories(
        truncated_info(shard.info, limit),
        shard.prompt,
        Ragged.from_rows([shard.response[i][:limit] for i in range(len(shard))], np.int32),
        Ragged.from_rows([shard.sampler_logprobs[i][:limit] for i in range(len(shard))], np.float32),
    )


def truncated_info(info: TrajectoryInfo, limit: int) -> TrajectoryInfo:
    finished = info.finished & (info.response_tokens <= limit)
    return replace(info, finished=finished, response_tokens=np.minimum(info.response_tokens, limit))


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
            grades = function(_record(prompts, row["sample_id"]), row["response"], row["finished"])
            grades_of = list(grades)
            row.update(grades)
    write_rows(path, rows)
    responses = [tokens[row["sample_id"]] for row in rows]
    return {
        "reward": mean(row["reward"] for row in rows),
        **{column: mean(row[column] for row in rows) for column in grades_of},
        **response_metrics(responses, [row["response"] for row in rows], [row["finished"] for row in rows]),
    }
