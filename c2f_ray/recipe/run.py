"""Sections about the run as a whole: its name and length, the cluster, checkpoints and the weight transfer."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from c2f_ray.recipe.base import Count, Positive, Section


class Run(Section):
    """What the run is called, when it ends, and what it records."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """Name of the run. Its files are in `run.folder`/`run.name`."""
    folder: str = "runs"
    """Folder that holds the runs. On several nodes: an absolute path that all of them see."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random: choice and order of prompts, sampling, merges by dare."""
    steps: Count | None = None
    """Number of updates after which the run ends. Give either this or `epochs`."""
    epochs: Count | None = None
    """Number of passes over the prompts after which the run ends."""
    deterministic: bool = False
    """Compose batches by sample id, not by arrival, so that the same seed gives the same bytes."""
    trace: bool = False
    """Record every shard and scoring call in trace.json. The stages of a step are always recorded."""
    wandb: str | None = None
    """Project of Weights & Biases to log to. The key is the environment variable WANDB_API_KEY."""

    @model_validator(mode="after")
    def _one_end(self) -> "Run":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Cluster(Section):
    """How actors are placed, started and replaced."""

    placement: Literal["PACK", "SPREAD"] = "PACK"
    """Put the actors on few nodes (PACK) or on many (SPREAD)."""
    start_timeout_s: Positive = 1800
    """Seconds to wait for room for the actors, and then for each actor to load its model."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """Restarts in one start of the run: of all rollout actors together, of a reward's workers, of the learner."""


class Checkpoints(Section):
    """When checkpoints are written and which are kept."""

    every_steps: Count = 10
    """Steps between two checkpoints. There is always one after the last step."""
    keep_last: Count = 2
    """Number of newest checkpoints to keep."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Number of further checkpoints to keep, by the mean reward of their step."""


class Weights(Section):
    """How the learner's weights reach the rollout actors."""

    bucket_mib: Count = 256
    """MiB of one packed bucket of tensors."""
    timeout_s: Positive = 600
    """Seconds that one transfer may take. It runs inside `learner.timeout_s`, which must not be shorter."""
