"""The models of a gateway: what belongs to one of them, and which of them a document is read by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from gma.model.config import LONGEST_INPUT, ModelConfig
from gma.model.tokenizer import Tokenizer
from gma.service.errors import NotReady, UnknownModel, Validation
from gma.service.gateway.contract import ModelInfo
from gma.service.gateway.predictions import Predictions
from gma.service.link.client import WorkerClient
from gma.service.link.lasting import LastingWorkers
from gma.service.observe import metrics


class Model:
    """A model's description and tokenizer, and the workers that run it.

    It stays what it is: another checkpoint under its name is another model, and whatever began with
    this one ends with it.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, workers: WorkerClient) -> None:
        """The name of `config` is that by which clients know it."""
        self.config = config
        self.tokenizer = tokenizer
        lengths = tokenizer.byte_lengths
        # As narrow as they may be: they are kept for each token of a whole document.
        self.token_bytes = lengths.astype(np.min_scalar_type(int(lengths.max())))
        """(vocab_size,): the bytes of each token."""
        self.workers = LastingWorkers(workers)
        self.predictions = Predictions(config)
        self._fingerprint: str | None = None
        name = config.name
        self._document_bytes = metrics.DOCUMENT_BYTES.labels(name)
        self._tokenized_bytes = metrics.TOKENIZED_BYTES.labels(name)
        self._tokenizer_seconds = metrics.TOKENIZER_SECONDS.labels(name)
        stages = metrics.TOKENIZE_SECONDS, metrics.QUEUE_SECONDS, metrics.COMPUTE_SECONDS
        self._stages = [stage.labels(name) for stage in stages]

    @property
    def name(self) -> str:
        """By which clients know it."""
        return self.config.name

    @property
    def info(self) -> ModelInfo:
        """What it is, as far as no worker has to be asked."""
        least = self.config.least_scores
        return ModelInfo(
            model=self.name,
            labels=list(self.config.labels),
            multi_label=self.config.multi_label,
            thresholds=None if least is None else list(least),
            pooling=self.config.pooling,
            causal=self.config.causal,
            workers=self.workers.count,
        )

    def tokenized(self, size: int, seconds: float) -> None:
        """Count so many bytes of text, on which a thread spent so long."""
        self._tokenized_bytes.inc(size)
        self._tokenizer_seconds.inc(seconds)

    def answered(self, size: int, tokenize_s: float, queue_s: float, compute_s: float) -> None:
        """Count a document, or an append, of so many bytes that was answered."""
        self._document_bytes.inc(size)
        for stage, seconds in zip(self._stages, (tokenize_s, queue_s, compute_s), strict=True):
            stage.observe(seconds)

    async def fingerprint(self) -> str:
        """Of its checkpoint. Raises NotReady if no worker has told it yet, and none is there."""
        if self._fingerprint is None:
            self._fingerprint = (await self.workers.info())["fingerprint"]
        return self._fingerprint


class Models:
    """The models that there are now, by name. One alone needs no name."""

    def __init__(self, *models: Model) -> None:
        self._models: dict[str, Model] = {}
        self._starting: frozenset[str] = frozenset()
        self.replace(models)

    def replace(self, models: Iterable[Model], starting: Iterable[str] = ()) -> None:
        """From now on there are these; those named in `starting` are to come."""
        self._models = {model.name: model for model in sorted(models, key=lambda each: each.name)}
        self._starting = frozenset(starting) - self._models.keys()

    async def begin(self) -> None:
        """Return when it is known which there are."""

    async def keep(self) -> None:
        """Keep up with which there are, for as long as this runs."""

    def __iter__(self) -> Iterator[Model]:
        """By name."""
        return iter(tuple(self._models.values()))

    @property
    def names(self) -> list[str]:
        """Of all, those to come too."""
        return sorted(self._models.keys() | self._starting)

    def choose(self, name: str | None = None) -> Model:
        """The model of that name, or the only one: those to come may never do.

        Raises UnknownModel; Validation if there are several and none is named; NotReady if it has
        yet to come.
        """
        names = self.names
        if name is None and len(self._models) > 1:
            raise Validation(f"model is missing: this service has {', '.join(names)}")
        if name is None and self._models:
            (name,) = self._models
        if name in self._models:
            return self._models[name]
        if name is None or name in self._starting:
            raise NotReady("no worker is ready: try again when one has started")
        there = f": this service has {', '.join(names)}" if names else ""
        raise UnknownModel(f"there is no model {name[:LONGEST_INPUT]}{there}")

    async def having(self, fingerprint: str, name: str) -> Model | None:
        """The model with that checkpoint; of several the one of that name, if it is one of them."""
        by_name = self._models.get(name)
        if by_name and await by_name.fingerprint() == fingerprint:
            return by_name
        for model in self:
            if model is not by_name and await model.fingerprint() == fingerprint:
                return model
        return None
