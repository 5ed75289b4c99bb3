"""What a checkpoint's ``config.json`` says: the architecture, and nothing about training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "contracts"
"""The checkpoint that comes with the package."""

DEFAULT_BASE = Path(__file__).parent / "checkpoints" / "base"
"""The base that training without a configuration begins from, where it came with the package."""

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

FILES = "config.json", "model.safetensors", "tokenizer.json"
"""What a checkpoint's folder holds."""

LASTING = 1
"""Heads of the form that forgets which forget nothing: the first ones."""

LONGEST_INPUT = 60
"""Characters of what was given in place of something valid, if a message is to repeat it."""

Place: TypeAlias = tuple[str | int, ...]
"""Where a field is: the names and indices that lead to it."""

Positive = Annotated[int, Field(gt=0)]

Score = Annotated[float, Field(ge=0, le=1)]

EVEN = 0.5
"""The threshold of a multi-label model's labels where nothing tells of another."""


class BackboneConfig(BaseModel):
    """Architecture of what reads tokens, whatever they are read for. Unknown fields are errors; a
    change of meaning raises ``format_version``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format_version: Annotated[Literal[1, 2], Field(description="1 has the paper's form alone")] = 2
    form: Annotated[
        Literal["paper", "forgetting"],
        Field(description="of the mixer: the paper's, or one that forgets"),
    ] = "paper"
    name: Annotated[str, Field(pattern=MODEL_NAME)]
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

    @model_validator(mode="after")
    def _check_backbone(self) -> Self:
        if self.format_version == 1 and self.form != "paper":
            raise ValueError(f"form {self.form} needs format_version 2")
        if self.conv_kernel == 1:
            raise ValueError("conv_kernel is 0 (none) or at least 2: one tap sees no neighbour")
        return self

    @property
    def label_count(self) -> int:
        """How many labels a document's evidence is for; a backbone alone has none."""
        return 0

    @property
    def tail(self) -> int:
        """Tokens of the past that the short convolution looks at."""
        return max(self.conv_kernel - 1, 0)

    @property
    def passes(self) -> int:
        """How often a document is read over: once as it comes, or once for each layer's memory and
        once more, each time whole."""
        return 1 if self.causal else self.layers + 1

    @property
    def memories(self) -> int:
        """Layers whose memory a document's state holds: all, or the one that a pass reads and the
        one that it writes."""
        return self.layers if self.causal else 2


class ModelConfig(BackboneConfig):
    """Architecture of one classifier."""

    labels: Annotated[tuple[str, ...], Field(min_length=2, strict=False)]
    multi_label: Annotated[
        bool, Field(description="a document has any number of the labels, each scored by itself")
    ] = False
    thresholds: Annotated[
        tuple[Score, ...] | None,
        Field(
            strict=False,
            description="the least score, label by label, at which the model says it is there; "
            "without them .5 if multi_label, else the best label whatever its score",
        ),
    ] = None
    pooling: Annotated[
        Literal["mean", "any"],
        Field(
            description="of the tokens: their mean says which labels are there, or any passage "
            "does by itself (multi-label models alone)"
        ),
    ] = "mean"
    prior_tokens: Annotated[
        float,
        Field(
            ge=0,
            description="tokens of score 0 in every mean: they keep short texts unsure; pooling "
            '"any" has none',
        ),
    ] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _check_labels(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "labels" not in fields:
            raise ValueError(
                "labels is missing: a base without labels answers nothing; make a classifier of it "
                "with `gma train --from`"
            )
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if self.thresholds is not None and len(self.thresholds) != len(self.labels):
            raise ValueError("thresholds must be as many as labels")
        if self.pooling == "any" and not self.multi_label:
            raise ValueError("pooling any is for multi-label models: it scores labels one by one")
        if self.pooling == "any" and self.prior_tokens:
            raise ValueError("prior_tokens are for pooling mean: pooling any has no mean")
        return self

    @property
    def label_count(self) -> int:
        """How many labels a document's evidence is for."""
        return len(self.labels)

    @property
    def backbone(self) -> BackboneConfig:
        """What the architecture is but for the labels."""
        return BackboneConfig(**self.model_dump(include={*BackboneConfig.model_fields}))

    @property
    def least_scores(self) -> tuple[float, ...] | None:
        """The least score, label by label, at which the model says that it is there; None if it
        says the best label whatever its score."""
        if self.multi_label and self.thresholds is None:
            return (EVEN,) * len(self.labels)
        return self.thresholds


def backbone_of(description: bytes) -> BackboneConfig:
    """Read the architecture in a ``config.json``, a base's or a classifier's.

    Raises pydantic's ValidationError.
    """
    try:
        return ModelConfig.model_validate_json(description).backbone
    except ValidationError:
        if b'"labels"' in description:
            raise
        return BackboneConfig.model_validate_json(description)


def named(checkpoint: Path | str) -> Path:
    """Return a checkpoint's folder: that of one which came with the package, if its bare name is
    given and there is no other of that name."""
    folder = Path(checkpoint)
    ours = DEFAULT_CHECKPOINT.parent / folder
    bare = folder.name == str(folder)
    return ours if bare and not folder.exists() and ours.is_dir() else folder


def lacking(folder: Path) -> str | None:
    """Why a folder is no checkpoint, and what to do; None if it has a checkpoint's files."""
    for name in FILES:
        if not (folder / name).is_file():
            break
    else:
        return None
    if not folder.exists():
        return f"{folder} is not a checkpoint: there is no such folder"
    if (folder / "manifest.json").is_file() and (folder / "model.onnx").is_file():
        return (
            f"{folder} is an exported model, not a checkpoint: give the checkpoint that it was "
            "made of, or serve it: GMA_CHECKPOINT may name it"
        )
    inner = folder / "checkpoint"
    hint = f": do you mean {inner}?" if (inner / FILES[0]).is_file() else f": it has no {name}"
    return f"{folder} is not a checkpoint{hint}"


class SupportsErrors(Protocol):
    """A ValidationError of pydantic's, or of a library that validates with it."""

    def errors(self) -> Sequence[Any]:
        """What is wrong, in pydantic's own terms."""


def dotted(place: Place) -> str:
    """The name of a field within others: `model.width`."""
    return ".".join(map(str, place))


def problems(
    error: SupportsErrors,
    *,
    name: Callable[[Place], str] = dotted,
    most: int | None = None,
    of: type[BaseModel] | None = None,
) -> str:
    """What is wrong, in one line: `width: input should be greater than 0, not 0; widht is unknown`.

    `name` says what the field at a place is called; of many problems, the first `most` are told.
    `of` is the model that was validated, so that a field that it has can be proposed for one that
    it has not.
    """
    return "; ".join(_problem(each, name, of) for each in error.errors()[:most])


def _problem(error: Any, name: Callable[[Place], str], of: type[BaseModel] | None) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if message[1:2].islower():
        message = message[0].lower() + message[1:]
    if not error["loc"]:
        return message
    field, given = name(error["loc"]), error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"{field} is unknown{_proposal(error['loc'], name, of)}"
        case "missing":
            return f"{field} is missing"
    short = isinstance(given, str | int | float) and len(repr(given)) <= LONGEST_INPUT
    return f"{field}: {message}, not {given!r}" if short else f"{field}: {message}"


def _proposal(place: Place, name: Callable[[Place], str], of: type[BaseModel] | None) -> str:
    """`: did you mean width?` if a field beside the one at the place is called much alike."""
    for part in place[:-1]:
        field = of.model_fields.get(str(part)) if of else None
        inner = field.annotation if field else None
        of = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    close = get_close_matches(str(place[-1]), of.model_fields if of else (), n=1)
    return f": did you mean {name((*place[:-1], close[0]))}?" if close else ""
