"""Section `evaluate`: held-out prompts, further metrics, and how the best fine actor is chosen."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from c2f_ray.recipe.base import Count, FunctionPath, Positive, Section
from c2f_ray.recipe.location import Location

LESS_IS_BETTER = ("truncated", "repeated_lines", "perplexity", "kl_to_instruct")
RECORD = "record."


class Choose(Section):
    """Which fine actor is the best: the one with most of a metric that is not worse than the instruct model in others.

    All metrics are columns of the evaluation's table.
    """

    by: str = "reward"
    """Metric of which the best has most."""
    at_most_over_instruct: dict[str, float] = {}
    """By metric: how much more than the instruct model the best may have."""
    at_least_over_instruct: dict[str, float] = {}
    """By metric: how much more than the instruct model the best must have. Below 0: how much less it may have."""

    @model_validator(mode="after")
    def _more_is_better(self) -> "Choose":
        if self.by in LESS_IS_BETTER:
            raise ValueError(f"by {self.by!r}: less of it is better; put it into at_most_over_instruct")
        return self


class Perplexity(Section):
    """Perplexity of held-out texts."""

    texts: Location
    """The texts: a .jsonl or .parquet file, or the name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    field: str = "text"
    """Field of a record that holds the text."""
    num_texts: Count | None = None
    """Number of texts to choose at random, by `run.seed`. null: all."""
    window_tokens: Annotated[int, Field(ge=2)] = 2048
    """Tokens of one window. Longer texts are cut into several, each read on its own."""


class GeneralTask(Section):
    """One task of lm-eval."""

    name: str
    """Name of the task in lm-eval, or of one in `include_path`."""
    few_shot: Annotated[int, Field(ge=0)] = 0
    """Examples before each question."""
    metric: str = "acc"
    """Metric as lm-eval names it, such as acc_norm; with a filter: exact_match,strict-match."""


class LmEval(Section):
    """General tasks by EleutherAI's lm-eval, which the extra `tasks` installs."""

    tasks: Annotated[list[GeneralTask], Field(min_length=1)]
    """The tasks."""
    include_path: str | None = None
    """Folder of further tasks in lm-eval's format."""
    limit: Count | None = None
    """Questions of each task. null: all."""
    chat_template: bool = False
    """Ask in the model's own chat template."""
    batch_size: Count = 16
    """Requests of one batch on the CPU. On GPUs vLLM makes the batches."""
    timeout_s: Positive = 86400
    """Seconds that all tasks of one model may take."""


class EndpointJudge(Section):
    """A judge behind an OpenAI-compatible API."""

    kind: Literal["endpoint"]
    """Name of the kind of judge."""
    url: str
    """Address of the API, such as https://api.openai.com/v1."""
    model: str
    """Name of the model that judges."""
    api_key_env: str | None = None
    """Environment variable that holds the key. null: no key is asked for."""
    parameters: dict[str, Any] = {"temperature": 0, "max_tokens": 1024}
    """Parameters that are sent with every request, unchanged."""
    requests_at_once: Count = 8
    """Requests that are under way at the same time."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """Further attempts at one request."""
    timeout_s: Positive = 120
    """Seconds that one attempt may take."""


class RewardJudge(Section):
    """The recipe's own reward as the judge: the answer with more reward is the better one."""

    kind: Literal["reward"]
    """Name of the kind of judge."""


class WinRate(Section):
    """Every model's answers compared with those of one of them (Chat1M and AlpacaEval style)."""

    prompts: Location
    """The questions: a .jsonl or .parquet file, or the name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    field: str = "messages"
    """Field of a record that holds text or chat messages."""
    num_prompts: Count | None = None
    """Number of questions to choose at random, by `run.seed`. null: all."""
    against: str = "instruct"
    """The model that all others are compared with; `record.FIELD`: answers in the questions' records."""
    template: Location | None = None
    """A .jinja file: what an endpoint is asked, made of messages, answer_a, answer_b and record."""


class MTBench(Section):
    """Questions of two turns, each answer scored from 1 to 10 (MT-Bench, arXiv 2306.05685)."""

    questions: Location
    """A .jsonl file in MT-Bench's own format: question_id, category, turns, and perhaps reference."""
    template: Location
    """A .jinja file: what the judge is asked, made of turns, answers and reference up to the turn, and record."""
    runs: Count = 1
    """Repetitions, each of which samples its answers anew at `rollout.temperature`."""


class Evaluate(Section):
    """What base, instruct, coarse and fine actors are measured by."""

    prompts: Location
    """Held-out questions: a .jsonl or .parquet file, or the name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    field: str = "messages"
    """Field of a record that holds text or chat messages."""
    num_prompts: Count | None = None
    """Number of questions to choose at random, by `run.seed`. null: all."""
    max_tokens: Count = 512
    """Longest response, in tokens. Responses are decoded greedily."""
    models: Annotated[list[str], Field(min_length=1)] = ["*"]
    """Shell patterns for the models: base, instruct, coarse, and the fine actors."""
    accuracy: FunctionPath | None = None
    """A function that grades one response, as module:name."""
    perplexity: Perplexity | None = None
    """Perplexity of held-out texts. null: none."""
    kl_to_instruct: bool = False
    """KL from the instruct model, in nats per token of each model's own responses, over the whole vocabulary."""
    lm_eval: LmEval | None = None
    """General tasks. null: none."""
    judge: EndpointJudge | RewardJudge | None = Field(default=None, discriminator="kind")
    """Who judges `win_rate` and `mt_bench`."""
    win_rate: WinRate | None = None
    """Comparison with the answers of one model. null: none."""
    mt_bench: MTBench | None = None
    """Scores of questions of two turns. null: none."""
    timeout_s: Positive = 3600
    """Seconds that all forward passes of one model may take."""
    choose: Choose | None = None
    """How the best fine actor is chosen, which becomes the link `fine/best`. null: none is chosen."""

    @model_validator(mode="after")
    def _judged_by_one_who_can(self) -> "Evaluate":
        endpoint = isinstance(self.judge, EndpointJudge)
        if self.mt_bench and not endpoint:
            raise ValueError("mt_bench: scores from 1 to 10 need a judge of kind endpoint")
        if self.win_rate and self.judge is None:
            raise ValueError("win_rate: give a judge")
        if self.win_rate and endpoint != (self.win_rate.template is not None):
            needs = "a judge of kind endpoint needs it" if endpoint else "only a judge of kind endpoint reads it"
            raise ValueError(f"win_rate.template: {needs}")
        if self.win_rate and not endpoint and self.win_rate.against.startswith(RECORD):
            raise ValueError("win_rate.against: answers beside the prompts need a judge of kind endpoint")
        if self.judge and not (self.win_rate or self.mt_bench):
            raise ValueError("judge: it has nothing to judge; give win_rate or mt_bench")
        return self
