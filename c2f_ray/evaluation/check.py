"""What there is to evaluate, with everything that can be known to be wrong found before Ray starts."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jinja2 import Template
from transformers import PreTrainedConfig

from c2f_ray.data.inputs import evaluation_source, heldout_prompts, run_folder
from c2f_ray.data.model_folder import absolute_folder, check_context, check_model
from c2f_ray.data.prompts import PromptSet, PromptSource, build_prompt_set
from c2f_ray.data.templates import chat_template
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.data.trajectory import Ragged
from c2f_ray.data.user_function import load_function
from c2f_ray.errors import RecipeError
from c2f_ray.evaluation.judge import check_judge, load_template
from c2f_ray.evaluation.likelihood import text_windows
from c2f_ray.evaluation.metrics import RESPONSE_METRICS
from c2f_ray.evaluation.mt_bench import TURNS, TwoTurnSource
from c2f_ray.evaluation.tasks import MEAN, check_tasks, task_column
from c2f_ray.learner.logprobs import LOGIT_SETTINGS
from c2f_ray.recipe import RECORD, Choose, EndpointJudge, Evaluate, Perplexity, Recipe
from c2f_ray.reward.check import check_reward
from c2f_ray.watch.metrics import read_metrics

Grader = Callable[[dict[str, Any], str, bool], dict[str, float]]
BEST = "best"  # the link in `fine/`


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    name: str
    folder: str
    template: str  # its own, where it has one
    prompts: PromptSet  # rendered with the template; the same rows for all candidates
    fine: bool


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation that can be done."""

    settings: Evaluate
    limit: int  # the response limit of the run's last step
    candidates: list[Candidate]
    rows: dict[str, range]  # of the prompts: `heldout`, `win_rate` and `mt_bench`
    pair_template: Template | None  # of the question which of two answers is better
    score_template: Template | None  # of the question how good an answer is
    windows: Ragged | None  # int32 token ids of the held-out texts
    folder: Path  # absolute, of the run

    @property
    def asked(self) -> PromptSet:
        """The prompts, which are the same questions for all candidates."""
        return self.candidates[0].prompts

    @property
    def instruct(self) -> str | None:
        """The instruct model's folder."""
        return next((candidate.folder for candidate in self.candidates if candidate.name == "instruct"), None)


def check_evaluate(recipe: Recipe) -> EvaluationPlan:
    """Raises RecipeError; writes nothing."""
    settings = recipe.evaluate
    if settings is None:
        raise RecipeError("evaluate: missing; it names the held-out prompts")
    check_reward(recipe.reward)
    check_model("policy.model", recipe.policy.model)
    folder = run_folder(recipe).absolute()
    if not (folder / "coarse").is_dir() or not (folder / "metrics.jsonl").is_file():
        raise RecipeError(
            f"run.name: {folder / 'coarse'}: no coarse actor there; run `c2f-ray train` with this recipe first"
        )
    candidates, rows = _candidates(recipe, settings, folder)
    if isinstance(settings.judge, EndpointJudge):
        check_judge(settings.judge)
    windows = _text_windows(recipe, settings.perplexity) if settings.perplexity else None
    names = [candidate.name for candidate in candidates]
    if settings.kl_to_instruct and "instruct" not in names:
        raise RecipeError(
            "evaluate.kl_to_instruct: there is no instruct model; name it in merge.instruct, and in evaluate.models"
        )
    columns = list(RESPONSE_METRICS)
    if settings.accuracy:
        columns += _try_grader(settings.accuracy, candidates[0].prompts)
    optional = ("perplexity", "kl_to_instruct", "win_rate", "mt_bench")
    columns += [column for column in optional if getattr(settings, column)]
    if settings.lm_eval:
        check_tasks(settings.lm_eval)
        columns += [MEAN, *(task_column(task) for task in settings.lm_eval.tasks)]
    if settings.win_rate:
        records = [candidates[0].prompts.records[row] for row in rows["win_rate"]]
        _check_against(settings.win_rate.against, names, records)
    if settings.choose:
        _check_choose(settings.choose, columns, names)
    limit = read_metrics(folder / "metrics.jsonl")[-1]["length/limit"]
    assert limit is not None  # it is a whole number in every step
    templates = _judge_templates(settings, candidates[0].prompts, rows)
    return EvaluationPlan(settings, int(limit), candidates, rows, *templates, windows, folder)


def _candidates(recipe: Recipe, settings: Evaluate, folder: Path) -> tuple[list[Candidate], dict[str, range]]:
    """The models, with the prompts that each is asked, and which rows of these are what."""
    best = folder / "fine" / BEST
    if best.exists() and not best.is_symlink():
        raise RecipeError(f"run.name: {best}: the link to the best fine actor goes there; move what is there away")
    folders = {"base": recipe.policy.model}
    if recipe.merge is not None:
        folders["instruct"] = recipe.merge.instruct
    folders["coarse"] = str(folder / "coarse")
    fine = {path.name: str(path) for path in sorted((folder / "fine").glob("*")) if path.is_dir() and path != best}
    chosen = {
        name: model
        for name, model in (folders | fine).items()
        if any(fnmatchcase(name, pattern) for pattern in settings.models)
    }
    if not chosen:
        raise RecipeError(f"evaluate.models: {settings.models}: none of {', '.join(folders | fine)} is meant")
    vocabulary = load_tokenizer(recipe.policy.model).get_vocab()
    prompts: dict[str, PromptSet] = {}  # by template
    rows: dict[str, range] = {}
    candidates = []
    turns = 1 if settings.mt_bench is None else TURNS
    for name, model in chosen.items():
        config = check_model("merge.instruct" if name == "instruct" else f"run.name ({name})", model)
        if load_tokenizer(model).get_vocab() != vocabulary:
            raise RecipeError(
                f"{model}: its tokenizer is not the policy's, {recipe.policy.model}; they must be the same"
            )
        limits = ("prompts.max_tokens", recipe.prompts.max_tokens, "evaluate.max_tokens", settings.max_tokens)
        check_context(config, *limits, turns=turns)
        _check_forward(config, settings, model)
        template = _template(recipe, model)
        if template not in prompts:
            prompts[template], rows = _prompts(recipe, settings, template)
        candidates.append(Candidate(name, absolute_folder(model), template, prompts[template], fine=name in fine))
    return candidates, rows


def _prompts(recipe: Recipe, settings: Evaluate, template: str) -> tuple[PromptSet, dict[str, range]]:
    """All that a model is asked, one part after the other, and where each is. Too long ones are refused, not dropped:
    all models must be asked the same.
    """
    sources: dict[str, PromptSource] = {}
    if settings.win_rate:
        sources["win_rate"] = evaluation_source(recipe, "evaluate.win_rate.prompts", settings.win_rate)
    if settings.mt_bench:
        key, questions = "evaluate.mt_bench.questions", settings.mt_bench.questions
        sources["mt_bench"] = TwoTurnSource(key, questions, system=recipe.prompts.system)
    tokenizer = load_tokenizer(recipe.policy.model)
    prompts = heldout_prompts(recipe, template)
    rows = {"heldout": range(len(prompts)), "win_rate": range(0), "mt_bench": range(0)}
    for name, source in sources.items():
        more = build_prompt_set(source, tokenizer, template, recipe.prompts.max_tokens, too_long="refuse")
        rows[name] = range(len(prompts), len(prompts) + len(more))
        prompts += more
    return prompts, rows


def _judge_templates(
    settings: Evaluate, asked: PromptSet, rows: dict[str, range]
) -> tuple[Template | None, Template | None]:
    """Those that ask for the better of two answers and for an answer's score, tried on the first of the prompts."""
    pair = one = None
    if settings.win_rate and settings.win_rate.template:
        row = rows["win_rate"][0]
        example = {"messages": asked.messages[row], "record": asked.records[row]}
        example |= {"answer_a": "<answer a>", "answer_b": "<answer b>"}
        shown = [asked.messages[row][-1]["content"], "<answer a>", "<answer b>"]
        pair = load_template("evaluate.win_rate.template", settings.win_rate.template, example, shown)
    if settings.mt_bench:
        record = asked.records[rows["mt_bench"][0]]
        example = {"turns": record["turns"], "reference": record["reference"], "record": record}
        example |= {"answers": ["<answer 1>", "<answer 2>"]}
        shown = [*record["turns"], "<answer 1>", "<answer 2>"]
        one = load_template("evaluate.mt_bench.template", settings.mt_bench.template, example, shown)
    return pair, one


def _check_forward(config: PreTrainedConfig, settings: Evaluate, model: str) -> None:
    for name, plain in LOGIT_SETTINGS.items():
        value = getattr(config, name, plain)
        if (settings.perplexity or settings.kl_to_instruct) and value != plain:
            raise RecipeError(
                f"evaluate: {model}: perplexity and kl_to_instruct do not apply {name}={value} of the model's config; "
                "leave both out"
            )


def _text_windows(recipe: Recipe, settings: Perplexity) -> Ragged:
    key = "evaluate.perplexity.texts"
    source = PromptSource(
        key, settings.texts, settings.split, settings.field, num_prompts=settings.num_texts, seed=recipe.run.seed
    )
    texts: list[str] = []
    for text_id, messages, _ in source.load():
        if len(messages) > 1:
            raise RecipeError(f"{key}: {settings.texts}: {text_id} holds a conversation; give texts")
        texts.append(messages[0]["content"])
    windows = text_windows(load_tokenizer(recipe.policy.model), texts, settings.window_tokens)
    if not len(windows):
        raise RecipeError(f"{key}: {settings.texts}: no text has two tokens")
    return windows


def _check_against(against: str, names: list[str], records: list[dict[str, Any]]) -> None:
    key = "evaluate.win_rate.against"
    if against.startswith(RECORD):
        field = against.removeprefix(RECORD)
        if missing := [record for record in records if not isinstance(record.get(field), str)]:
            raise RecipeError(f"{key}: {against}: {len(missing)} of {len(records)} prompts have no text in {field!r}")
    elif against not in names:
        raise RecipeError(f"{key}: {against}: no such model; there are {', '.join(names)}")


def _check_choose(rule: Choose, columns: list[str], names: list[str]) -> None:
    """The rule speaks of columns that the table will have, and of an instruct model that is in it."""
    bounds = {f"{side}_over_instruct": getattr(rule, f"{side}_over_instruct") for side in ("at_most", "at_least")}
    keys = [("by", rule.by), *((side, key) for side, metrics in bounds.items() for key in metrics)]
    if problems := [
        f"evaluate.choose.{side}: {key}: this evaluation has no such metric; it has {', '.join(columns)}"
        for side, key in keys
        if key not in columns
    ]:
        raise RecipeError(*problems)
    if any(bounds.values()) and "instruct" not in names:
        raise RecipeError("evaluate.choose: it compares with the instruct model; name that in merge.instruct")


def _try_grader(path: str, prompts: PromptSet) -> list[str]:
    """The grader's columns. One that cannot grade an empty response would fail after all the models have answered."""
    grades: Any = {}
    try:
        grades = load_grader(path)(record_of(prompts, 0), "", False)
        wrong = None if isinstance(grades, dict) else f"gave {grades!r}, not a dict of numbers"
    except Exception as error:  # it is the user's code
        wrong = f"fails on an empty response: {type(error).__name__}: {error}"
    if wrong:
        raise RecipeError(f"evaluate.accuracy: {path} {wrong}")
    return list(grades)


def record_of(prompts: PromptSet, row: int) -> dict[str, Any]:
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
