"""Section `merge`: how fine actors are made of the coarse actor and the instruct model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from c2f_ray.recipe.base import Dtype, Positive, Section, Share
from c2f_ray.recipe.location import Location


class RatioRule(Section):
    """The ratio of some of a model's tensors: those of a range of layers, those whose name fits, or those of both."""

    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    """First and last layer, counted from 0. null: all."""
    modules: str | None = None
    """Shell pattern for whole tensor names, such as `*.self_attn.*`. null: all."""
    ratio: Share | None = None
    """Ratio of these tensors. Give either this or `gradient`."""
    gradient: Annotated[list[Share], Field(min_length=2)] | None = None
    """Ratios at even distances over the layers, with linear interpolation between them."""

    @model_validator(mode="after")
    def _one_ratio(self) -> "RatioRule":
        if (self.ratio is None) == (self.gradient is None):
            raise ValueError("give exactly one of ratio and gradient")
        if self.layers is None and self.modules is None and self.gradient is None:
            raise ValueError("give layers or modules; the ratio of all other tensors is the schedule's")
        if self.layers is not None and self.layers[0] > self.layers[1]:
            raise ValueError(f"layers are first and last, counted from 0; {self.layers[0]} is after {self.layers[1]}")
        return self


class RatioSchedule(Section):
    """A fine actor whose ratio is not the same everywhere. A tensor takes the first rule that fits it."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z]\w*$")]
    """Name of the schedule. The fine actor's folder is METHOD-NAME."""
    ratio: Share
    """Ratio of tensors that no rule fits."""
    rules: Annotated[list[RatioRule], Field(min_length=1)]
    """The rules, in order."""


MergeMethod = Literal["residue", "interpolate", "task_arithmetic", "slerp", "ties", "dare"]
MERGE_METHODS_WITH = {"scale": ("task_arithmetic", "ties", "dare")}
MERGE_METHODS_WITH |= dict.fromkeys(("coarse_density", "instruct_density"), ("ties", "dare"))


class Merge(Section):
    """The models that are merged, by which methods, at which ratios."""

    instruct: Location
    """Instruct model: a Hugging Face folder, or a name on the hub."""
    base: Location | None = None
    """Base model of both. null: `policy.model`."""
    coarse: Location | None = None
    """Coarse actor. null: `coarse/` of the run."""
    methods: Annotated[list[MergeMethod], Field(min_length=1)] = ["residue"]
    """Methods, each of which makes a fine actor for every ratio and every schedule."""
    ratios: list[Share] = []
    """Ratios of fine actors that have the same ratio everywhere."""
    schedules: list[RatioSchedule] = []
    """Fine actors whose ratio depends on the layer or the module."""
    scale: Positive = 1.0
    """Factor (lambda) of everything added to the base. Of task_arithmetic, ties and dare."""
    coarse_density: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the coarse actor's delta that is kept. Of ties and dare."""
    instruct_density: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the instruct model's delta that is kept. Of ties and dare. At 1, ratio 0 is the instruct model."""
    allow: list[str] = []
    """Configuration fields in which the models may differ; `tokenizer` for their vocabularies."""
    dtype: Dtype | None = None
    """Type of the files that are written. null: the instruct model's."""
    timeout_s: Positive = 3600
    """Seconds that one weight file may take. A merge writes about 32 of them for each fine actor."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> "Merge":
        if not self.ratios and not self.schedules:
            raise ValueError("give ratios or schedules")
        for field, methods in MERGE_METHODS_WITH.items():
            changed = getattr(self, field) != type(self).model_fields[field].default
            if changed and not set(methods) & set(self.methods):
                raise ValueError(
                    f"{field} has no effect on methods {self.methods}; leave it out, or add {methods[0]!r}"
                )
        return self
