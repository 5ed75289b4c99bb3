"""What a checkpoint's ``config.json`` says: the architecture, and nothing about training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "books"
"""The checkpoint that comes with the package."""

Positive = Annotated[int, Field(gt=0)]


class ModelConfig(BaseModel):
    """Architecture of one classifier. Unknown fields are errors; a change of meaning raises
    ``format_version``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    labels: Annotated[tuple[str, ...], Field(min_length=2, strict=False)]

    vocab_size: Positive
    width: Positive
    layers: Positive
    heads: Positive
    routing_dim: Annotated[int, Field(gt=0, description="width of the routing space, per head")]
    value_dim: Annotated[int, Field(gt=0, description="width of a value, per head")]
    num_components: Annotated[int, Field(gt=0, description="mixture components, per head")]
    mlp_width: Positive
    causal: bool = True
    conv_kernel: Annotated[
        int, Field(ge=0, description="taps of the short causal convolution; 0 leaves it out")
    ] = 4
    normalize_routing: Annotated[
        bool, Field(description="RMS-normalise queries and keys before the mixture scores them")
    ] = True
    variance_floor: Annotated[
        float, Field(gt=0, description="least variance of a component in any direction")
    ] = 1e-2
    epsilon: Annotated[
        float, Field(gt=0, description="added to the mass that a read divides by")
    ] = 1e-6
    prior_tokens: Annotated[
        float,
        Field(ge=0, description="of score 0, in every mean: they keep short texts unsure"),
    ] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if self.conv_kernel == 1:
            raise ValueError("conv_kernel is 0 (none) or at least 2: one tap sees no neighbour")
        return self

    @property
    def tail(self) -> int:
        """Tokens of the past that the short convolution looks at."""
        return max(self.conv_kernel - 1, 0)


def problems(error: ValidationError) -> str:
    """What is wrong, in one line that names each field."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        if problem["loc"]
        else problem["msg"]
        for problem in error.errors()
    )
