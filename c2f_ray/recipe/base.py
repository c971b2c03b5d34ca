"""The base class of every section of a recipe, and the types that its fields share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
FunctionPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


class Section(BaseModel):
    """A part of a recipe. The text under a field becomes its description in the docs and in the JSON schema."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
