"""What a training configuration says."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gma.model.config import ModelConfig, problems
from gma.model.training.errors import TrainingError
from gma.model.training.evaluation import MULTI_LABEL, ONE_LABEL, Figure
from gma.model.training.token_scores import TokenScoresConfig

FROM_DATA = {
    "labels": "they are the train split's",
    "multi_label": "documents with lists of labels say so",
    "thresholds": "they are fitted to the valid split",
    "prior_tokens": "they are fitted to the valid split",
}
"""Fields of the model that no configuration sets."""

Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainingConfig(BaseModel):
    """How to train. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(gt=0)] = 1000
    tokens_per_step: Annotated[int, Field(gt=0)] = 65536
    lengths: Annotated[
        tuple[Annotated[tuple[Fraction, Annotated[int, Field(gt=0)]], Field(strict=False)], ...],
        Field(
            strict=False,
            description="curriculum: (share of the steps done, tokens of a crop from there on)",
        ),
    ] = ((0.0, 1024), (0.3, 4096))
    start_fraction: Annotated[
        Fraction, Field(description="crops that begin where their document begins")
    ] = 0.15
    balance: Annotated[
        Fraction,
        Field(description="1: each label is drawn as often as any other; 0: as documents have it"),
    ] = 1.0
    label_weights: Annotated[
        dict[str, Annotated[float, Field(gt=0)]],
        Field(description="by label: how many times as often as balance says it is drawn"),
    ] = {}
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    final_learning_rate: Annotated[Fraction, Field(description="as a share of learning_rate")] = (
        0.05
    )
    warmup: Annotated[Fraction, Field(description="share of the steps")] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
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
    average: Annotated[
        float,
        Field(ge=0, lt=1, description="decay a step of the averaged weights; 0: no averaging"),
    ] = 0.995
    evaluate_every: Annotated[int, Field(gt=0, description="steps")] = 200
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
    patience: Annotated[
        int, Field(ge=0, description="evaluations without a better one before stopping; 0: never")
    ] = 0
    compile: Annotated[bool, Field(description="torch.compile; pays on a GPU")] = False
    token_scores: TokenScoresConfig = TokenScoresConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        shares = [share for share, _ in self.lengths]
        if not shares or shares[0] != 0.0 or shares != sorted(shares):
            raise ValueError("lengths must begin at 0.0 and ascend")
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
        allowed = MULTI_LABEL if multi_label else ONE_LABEL
        if self.choose_by not in allowed:
            documents = "lists of labels" if multi_label else "one label each"
            raise TrainingError(
                f"choose_by is {self.choose_by}, but of documents with {documents} it is one of "
                f"{', '.join(allowed)}"
            )
        if multi_label and self.none_below is not None:
            raise TrainingError("none_below is for documents with one label each, not with lists")

    def length_at(self, step: int) -> int:
        """Return how many tokens a crop has at this step."""
        return [length for share, length in self.lengths if step >= share * self.steps][-1]

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate at this step: a linear warm-up, then a cosine."""
        warmup = self.warmup * self.steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(self.steps - warmup, 1)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    def language_weight_at(self, step: int) -> float:
        """Return the weight of the next-token loss, linear from the first to the last."""
        first, last = self.language_weight
        return first + (last - first) * step / self.steps


def read_config(file: Path) -> tuple[ModelConfig, TrainingConfig]:
    """Read the tables of a TOML file, ``[model]`` and ``[training]``.

    The data has the last word on the model: ``labels`` are stand-ins, and ``vocab_size`` is how
    many tokens the tokenizer may have at most. A model is of the form that forgets unless it says
    otherwise. Raises TrainingError that names what is wrong.
    """
    try:
        tables = tomllib.loads(file.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"{file}: {error}") from error
    model, training = tables.pop("model", None), tables.pop("training", {})
    if tables or not isinstance(model, dict) or not isinstance(training, dict):
        unknown = f", not {', '.join(sorted(tables))}" if tables else ""
        raise TrainingError(f"{file}: the tables are [model], and [training] if need be{unknown}")
    for name, origin in FROM_DATA.items():
        if name in model:
            raise TrainingError(f"{file}: [model] takes no {name}: {origin}")
    try:
        table = "model"
        architecture = ModelConfig.model_validate(
            {
                "form": "forgetting",
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
