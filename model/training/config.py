"""What a training configuration says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from gma.model.config import BackboneConfig, ModelConfig, problems
from gma.model.training.errors import TrainingError
from gma.model.training.evaluation import MULTI_LABEL, ONE_LABEL, Figure
from gma.model.training.schedule import Fraction, Schedule
from gma.model.training.token_scores import TokenScoresConfig

FROM_DATA = {
    "labels": "they are the train split's",
    "multi_label": "documents with lists of labels say so",
    "thresholds": "they are fitted to the valid split",
    "prior_tokens": "they are fitted to the valid split",
}
"""Fields of the model that no configuration sets."""


class TrainingConfig(Schedule):
    """How to train a classifier."""

    backbone_learning_rate: Annotated[
        float,
        Field(ge=0, description="of what another checkpoint began, as a share of learning_rate"),
    ] = 1.0
    balance: Annotated[
        Fraction,
        Field(description="1: each label is drawn as often as any other; 0: as documents have it"),
    ] = 1.0
    label_weights: Annotated[
        dict[str, Annotated[float, Field(gt=0)]],
        Field(
            default_factory=dict,
            description="by label: how many times as often as balance says it is drawn",
        ),
    ]
    token_dropout: Annotated[
        tuple[Fraction, Fraction],
        Field(
            strict=False,
            description="share of a crop's tokens that is hidden: drawn from this range",
        ),
    ] = (0.0, 0.3)
    rare_dropout: Annotated[
        Fraction, Field(description="share hidden of the tokens that few training documents use")
    ] = 0.0
    rare_documents: Annotated[
        Fraction, Field(description="a token is rare if at most this share of documents uses it")
    ] = 0.05
    dropout: Annotated[
        float,
        Field(ge=0, lt=1, description="dropout of the last layer's output, for the label's loss"),
    ] = 0.1
    label_smoothing: Fraction = 0.1
    prefix: Annotated[
        int, Field(gt=0, description="the loss is taken after every so many tokens of a crop")
    ] = 256
    language_weight: Annotated[
        tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]],
        Field(
            strict=False,
            description="weight of the next-token loss: at the start, and at the end (linear)",
        ),
    ] = (1.0, 0.3)
    class_weight: Annotated[float, Field(ge=0, description="weight of the label's loss")] = 1.0
    span_weight: Annotated[
        float,
        Field(
            ge=0,
            description='weight of the loss of documents\' spans, for pooling "any"; at 0 nothing '
            "that is trained sees where they are",
        ),
    ] = 1.0
    find_spans: Annotated[
        int,
        Field(
            ge=0,
            description='rounds in which spans are looked for by labels alone, for pooling "any"; '
            "they take the place of those given. 0: the spans are those given",
        ),
    ] = 0
    choose_by: Annotated[
        Figure,
        Field(description="the weights are kept whose mean of it over valid's views is best"),
    ] = "macro_f1"
    none_below: Annotated[
        Fraction | None,
        Field(
            description="of models that give one label: each label's threshold is the score that "
            "this share of valid's right answers has less than; none if nothing is said"
        ),
    ] = None
    token_scores: TokenScoresConfig = TokenScoresConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for _, length in self.lengths:
            if length % self.prefix:
                raise ValueError(
                    f"crops of {length} tokens are no multiple of prefix ({self.prefix})"
                )
        if self.token_dropout[0] > self.token_dropout[1]:
            raise ValueError("token_dropout is (least, most)")
        return self

    def check(self, *, multi_label: bool, pooling: str) -> None:
        """Raise TrainingError for what does not go with documents that have one label, or any
        number."""
        if pooling == "any" and not multi_label:
            raise TrainingError("pooling any is for documents with lists of labels, not one each")
        if self.find_spans and (pooling != "any" or not self.span_weight):
            raise TrainingError('find_spans is for pooling "any", and span_weight above 0')
        allowed = MULTI_LABEL if multi_label else ONE_LABEL
        if self.choose_by not in allowed:
            documents = "lists of labels" if multi_label else "one label each"
            raise TrainingError(
                f"choose_by is {self.choose_by}, but of documents with {documents} it is one of "
                f"{', '.join(allowed)}"
            )
        if multi_label and self.none_below is not None:
            raise TrainingError("none_below is for documents with one label each, not with lists")

    def language_weight_at(self, step: int) -> float:
        """Return the weight of the next-token loss, linear from the first to the last."""
        first, last = self.language_weight
        return first + (last - first) * step / self.steps


def read_config(
    file: Path | None, base: BackboneConfig | None = None
) -> tuple[ModelConfig, TrainingConfig]:
    """Read the tables of a TOML file, ``[model]`` and ``[training]``; without one, the defaults.

    The data has the last word on the model: ``labels`` are stand-ins, and ``vocab_size`` is how
    many tokens the tokenizer may have at most. A model is of the form that forgets unless it says
    otherwise; with a base it is what that is, and ``[model]`` may be missing. Raises TrainingError
    that names what is wrong.
    """
    tables = read_tables(file) if file else {}
    model, training = tables.pop("model", None if base is None else {}), tables.pop("training", {})
    if tables or not isinstance(model, dict) or not isinstance(training, dict):
        unknown = f", not {', '.join(sorted(tables))}" if tables else ""
        raise TrainingError(f"{file}: the tables are [model], and [training] if need be{unknown}")
    for name, origin in FROM_DATA.items():
        if name in model:
            raise TrainingError(f"{file}: [model] takes no {name}: {origin}")
    begun: dict[str, Any] = {"form": "forgetting"}
    if base:
        begun = base.model_dump()
        most = model.get("vocab_size")
        if isinstance(most, int) and most >= base.vocab_size:
            model = {**model, "vocab_size": base.vocab_size}
        for name in begun.keys() & model.keys() - {"name"}:
            if model[name] != begun[name]:
                raise TrainingError(
                    f"{file}, [model]: {name} is {model[name]!r}, but in the checkpoint to begin "
                    f"from it is {begun[name]!r}: leave it out"
                )
    try:
        table = "model"
        architecture = ModelConfig.model_validate(
            {
                **begun,
                **model,
                "labels": ("a", "b"),
                "multi_label": model.get("pooling") == "any",
            }
        )
        table = "training"
        return architecture, TrainingConfig.model_validate(training)
    except ValidationError as error:
        known = TrainingConfig if table == "training" else ModelConfig
        raise TrainingError(f"{file}, [{table}]: {problems(error, of=known)}") from error


def read_tables(file: Path) -> dict[str, Any]:
    """Read a TOML file. Raises TrainingError if it is none."""
    try:
        return tomllib.loads(file.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"{file}: {error}") from error
