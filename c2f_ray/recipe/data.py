"""Sections about the model to train and the prompts to train it on."""

from typing import Literal

from c2f_ray.recipe.base import Count, Section
from c2f_ray.recipe.location import Location


class Policy(Section):
    """The model that is trained: the base that becomes the coarse actor."""

    model: Location
    """Hugging Face folder, or a name on the hub."""
    chat_template: Location = "model"
    """`model`: the model's own; `plain`: the one shipped for base models; else the path of a .jinja file."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in the rollout engines and in the learner's forward pass."""


class Prompts(Section):
    """The prompts to train on."""

    source: Location
    """A .jsonl or .parquet file, or the name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    field: str = "messages"
    """Field of a record that holds text or chat messages."""
    turns: Literal["all", "first"] = "all"
    """Part of a conversation: up to the last user message (`all`), or the first user message only."""
    system: str | None = None
    """System message put before every prompt."""
    num_prompts: Count | None = None
    """Number of prompts to choose at random, by `run.seed`. null: all."""
    max_tokens: Count = 384
    """Longest prompt, in tokens after rendering."""
    too_long: Literal["drop", "refuse"] = "drop"
    """Drop longer prompts, or refuse to start."""
    per_step: Count = 128
    """Prompts of one step."""
    uniform_over: str | None = None
    """Field, such as the source of a record, all of whose values are drawn equally often."""
    shuffle: bool = True
    """Draw in a new random order in every epoch, by `run.seed`."""
