"""Training: labelled documents in, a checkpoint out."""

from __future__ import annotations

import json
import math
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model import corpus, stacking, token_scores, weights
from model.classifier import Classifier
from model.config import ModelConfig
from model.corpus import Corpus
from model.crops import Crops
from model.evaluate import Measured, measure_tokens
from model.ops.chunked import Rows
from model.token_scores import TokenScoresConfig
from model.tokenizer import Tokenizer

PREPARED = "prepared"
"""Folder of a run: the tokenizer, the labels and the token ids of both splits."""

Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainingError(ValueError):
    """A run that can't start; the message says why."""


class TrainingConfig(BaseModel):
    """How to train. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    steps: Annotated[int, Field(gt=0)] = 1000
    tokens_per_step: Annotated[int, Field(gt=0)] = 65536
    lengths: Annotated[
        tuple[tuple[Fraction, int], ...],
        Field(description="length curriculum: (share of the steps done, tokens of a crop) from there on"),
    ] = ((0.0, 1024), (0.3, 4096))
    start_fraction: Annotated[
        Fraction, Field(description="crops that begin where their document begins")
    ] = 0.15
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    final_learning_rate: Annotated[Fraction, Field(description="as a share of learning_rate")] = 0.05
    warmup: Annotated[Fraction, Field(description="share of the steps")] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    token_dropout: Annotated[
        tuple[Fraction, Fraction],
        Field(description="share of a crop's tokens that is hidden: drawn from this range"),
    ] = (0.0, 0.3)
    rare_dropout: Annotated[
        Fraction, Field(description="share hidden of the tokens that few training documents use")
    ] = 0.0
    rare_documents: Annotated[
        Fraction, Field(description="a token is rare if at most this share of documents uses it")
    ] = 0.05
    dropout: Annotated[Fraction, Field(description="of the last hidden layer")] = 0.1
    label_smoothing: Annotated[Fraction, Field()] = 0.1
    prefix: Annotated[
        int, Field(gt=0, description="the loss is taken after every so many tokens of a crop")
    ] = 256
    language_weight: Annotated[
        tuple[float, float],
        Field(description="weight of the next-token loss: at the start, and at the end (linear)"),
    ] = (1.0, 0.3)
    class_weight: Annotated[float, Field(ge=0)] = 1.0
    average: Annotated[
        float, Field(ge=0, lt=1, description="decay a step of the averaged weights; 0: no averaging")
    ] = 0.995
    evaluate_every: Annotated[int, Field(gt=0, description="steps")] = 200
    patience: Annotated[
        int, Field(ge=0, description="evaluations without a better one before stopping; 0: never")
    ] = 0
    compile: bool = False
    token_scores: TokenScoresConfig = TokenScoresConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.lengths or self.lengths[0][0] != 0.0:
            raise ValueError("lengths must begin at 0.0")
        for _, length in self.lengths:
            if length % self.prefix:
                raise ValueError(f"crops of {length} tokens are no multiple of prefix ({self.prefix})")
        return self

    def length_at(self, step: int) -> int:
        """Tokens of a crop at this step."""
        return [length for share, length in self.lengths if step >= share * self.steps][-1]

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine."""
        warmup = self.warmup * self.steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(self.steps - warmup, 1)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    def language_weight_at(self, step: int) -> float:
        first, last = self.language_weight
        return first + (last - first) * step / self.steps


def read_config(file: Path) -> tuple[dict[str, object], TrainingConfig]:
    """A TOML file's tables: ``[model]``, all of ModelConfig but the labels, and ``[training]``."""
    try:
        tables = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{file}: {error}") from error
    unknown = tables.keys() - {"model", "training"}
    if unknown or "model" not in tables:
        raise TrainingError(f"{file}: the tables are [model] and [training], not {sorted(tables)}")
    try:
        return tables["model"], TrainingConfig.model_validate(tables.get("training", {}))
    except ValidationError as error:
        raise TrainingError(f"{file}: {error}") from error


@dataclass(frozen=True)
class Prepared:
    """What training reads: made once from the documents, kept in the run's folder."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    train: Corpus
    valid: Corpus

    @classmethod
    def make(cls, data: Path, out: Path, vocab_size: int) -> Prepared:
        """Train a tokenizer on the train split, encode both splits, and keep them in ``out``."""
        labels = tuple(sorted({document.label for document in corpus.read(data, "train")}))
        if len(labels) < 2:
            raise TrainingError(f"{data}: the train split needs at least two labels, it has {labels}")
        tokenizer = Tokenizer.train((d.text for d in corpus.read(data, "train")), vocab_size)
        prepared = cls(
            tokenizer,
            labels,
            Corpus.encode(corpus.read(data, "train"), tokenizer, labels),
            Corpus.encode(corpus.read(data, "valid"), tokenizer, labels),
        )
        out.mkdir(parents=True, exist_ok=True)
        prepared.train.save(out / "train.npz")
        prepared.valid.save(out / "valid.npz")
        tokenizer.save(out / "tokenizer.json")
        (out / "labels.json").write_text(json.dumps(labels))  # last: its presence says "complete"
        return prepared

    @classmethod
    def load(cls, out: Path) -> Prepared:
        return cls(
            Tokenizer.load(out / "tokenizer.json"),
            tuple(json.loads((out / "labels.json").read_text())),
            Corpus.load(out / "train.npz"),
            Corpus.load(out / "valid.npz"),
        )


class Losses(nn.Module):
    """A classifier's losses over a batch of crops: the label's at every prefix, the next token's."""

    def __init__(self, classifier: Classifier, config: TrainingConfig) -> None:
        super().__init__()
        self.classifier = classifier
        self.config = config

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        """tokens and keep (B, N), lengths and labels (B,) -> label loss (), next-token loss ()."""
        hidden, rows = self.hidden(tokens, lengths, keep)
        with torch.autocast(tokens.device.type, enabled=False):
            label = self.label_loss(hidden.float(), labels, rows)
        return torch.stack([label, self.language_loss(hidden, tokens, rows)])

    def hidden(self, tokens: Tensor, lengths: Tensor, keep: Tensor) -> tuple[Tensor, Rows]:
        """The last layer's output (B, N, W): each crop a document of one row, nothing before it."""
        which = torch.arange(len(tokens), device=tokens.device)
        rows = Rows.of(lengths, which, tokens.shape[1], torch.float32)
        x = self.classifier.embedding(tokens) * keep[..., None]
        if self.classifier.config.causal:
            return self.classifier.hidden(x, rows, self.classifier.new_states(len(tokens)))[0], rows
        return self.classifier.hidden_bidirectional(x, rows), rows

    def label_loss(self, hidden: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Of the deep scores alone: beside the tokens' own they would have little left to learn."""
        hidden = functional.dropout(hidden, self.config.dropout, training=self.training)
        there = rows.valid[..., None].float()
        scores = self.classifier.pooling.deep_scores(hidden) * there
        evidence = scores.unflatten(1, (-1, self.config.prefix)).sum(2).cumsum(1)
        weight = there.unflatten(1, (-1, self.config.prefix)).sum(2).cumsum(1)
        prefixes = evidence / weight.clamp_min(1.0)
        return functional.cross_entropy(
            prefixes.flatten(0, 1),
            labels.repeat_interleave(prefixes.shape[1]),
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )

    def language_loss(self, hidden: Tensor, tokens: Tensor, rows: Rows) -> Tensor:
        """Cross-entropy of each next token, the embedding the output layer too (causal models)."""
        if not self.classifier.config.causal or not any(self.config.language_weight):
            return hidden.new_zeros((), dtype=torch.float32)
        targets = tokens.roll(-1, 1).masked_fill(~rows.valid.roll(-1, 1), -100)
        targets[:, -1] = -100
        # Piece by piece and recomputed backward: the logits of all tokens would fill the memory.
        pieces = zip(
            hidden.flatten(0, 1).split(1 << 14), targets.flatten().split(1 << 14), strict=True
        )
        embedding = self.classifier.embedding.weight
        total = [checkpoint(_next_token, x, embedding, y, use_reentrant=False) for x, y in pieces]
        return torch.stack(total).sum() / (targets >= 0).sum()


def _next_token(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    normed = functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) * hidden.shape[-1] ** -0.5
    logits = functional.linear(normed * 4.0, embedding)
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


class Run:
    """One training run and its folder: ``log.jsonl``, ``resume.safetensors``, ``checkpoint/``."""

    def __init__(
        self, prepared: Prepared, out: Path, model: ModelConfig, config: TrainingConfig
    ) -> None:
        self.prepared, self.out, self.model, self.config = prepared, out, model, config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")
        self.classifier = Classifier(model).to(self.device)
        self.crops = Crops(prepared.train, config.start_fraction, self.device)
        self.classifier.pooling.token.weight.requires_grad_(False)
        self.average = Classifier(model).to(self.device).requires_grad_(False).eval()
        self.average.load_state_dict(self.classifier.state_dict())
        self.losses = Losses(self.classifier, config)
        self.forward = torch.compile(self.losses, dynamic=False) if config.compile else self.losses
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.rare = self._rare() if config.rare_dropout else None
        self.step = 0
        self.best, self.since_best = -math.inf, 0

    def _groups(self) -> list[dict[str, object]]:
        """Matrices decay; norms, biases and mixtures do not; the tokens' own scores stay."""
        matrices, others = [], []
        for name, parameter in self.classifier.named_parameters():
            if not parameter.requires_grad:
                continue
            (others if parameter.ndim < 2 or ".mixture." in name else matrices).append(parameter)
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def _rare(self) -> Tensor:
        """(vocab,) bool: tokens that few training documents use, names above all."""
        train = self.prepared.train
        used = train.document_frequency(self.model.vocab_size)
        return torch.from_numpy(used <= self.config.rare_documents * len(train)).to(self.device)

    def fit_token_scores(self, progress: Progress) -> None:
        """The linear part first: what it leaves open is for the deep reading."""
        fitted = token_scores.fit(
            self.crops, self.prepared.train, self.model, self.config.token_scores, progress
        )
        for classifier in self.classifier, self.average:
            classifier.pooling.token.weight.data.copy_(fitted)

    def train(self, progress: Progress) -> None:
        """Step by step to the end, or until valid has not improved for ``patience`` evaluations."""
        bar = progress.add_task("training", total=self.config.steps, completed=self.step)
        started, seen = time.monotonic(), 0
        while self.step < self.config.steps:
            label, language, tokens = self._train_step()
            seen += tokens
            self.step += 1
            progress.update(bar, advance=1)
            if self.step % 20 == 0 or self.step == self.config.steps:
                rate = seen / (time.monotonic() - started)
                line = {"label_loss": label.item(), "language_loss": language.item()}
                self._log(**line, tokens_per_second=round(rate), length=self.config.length_at(self.step))
                progress.update(bar, description=f"loss {line['label_loss']:.3f}")
            if self.step % self.config.evaluate_every == 0 or self.step == self.config.steps:
                self._evaluate()
                self._save_resume()
                if self.config.patience and self.since_best >= self.config.patience:
                    self._log(stopped="valid no longer improves")
                    break

    def _train_step(self) -> tuple[Tensor, Tensor, int]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        length = self.config.length_at(self.step)
        rng = np.random.default_rng([self.config.seed, self.step])
        rows = max(1, self.config.tokens_per_step // length)
        tokens, lengths, labels = self.crops.draw(rng, rows, length)
        keep = self._kept(tokens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            label, language = self.forward(tokens, lengths, labels, keep)
        weighted = self.config.class_weight * label
        weighted = weighted + self.config.language_weight_at(self.step) * language
        weighted.backward()
        nn.utils.clip_grad_norm_(self.classifier.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Early on the average follows closely, or it would remember the random start.
        decay = min(self.config.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            mine, new = list(self.average.parameters()), list(self.classifier.parameters())
            torch._foreach_lerp_(mine, new, 1.0 - decay if self.config.average else 1.0)
        return label.detach(), language.detach(), tokens.numel()

    def _kept(self, tokens: Tensor) -> Tensor:
        """(B, N) float: 0 where a token is hidden; each crop draws its own share."""
        generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + self.step)

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=self.device)

        low, high = self.config.token_dropout
        share = low + (high - low) * random(len(tokens), 1)
        if self.rare is not None:
            share = torch.where(self.rare[tokens], self.config.rare_dropout, share)
        return (random(*tokens.shape) >= share).float()

    def _evaluate(self) -> None:
        """Stack and measure the averaged weights; keep them if no evaluation so far was better."""
        candidate = Classifier(self.model).to(self.device).requires_grad_(False).eval()
        candidate.load_state_dict(self.average.state_dict())
        valid = self.prepared.valid
        deep, token = stacking.fit(candidate, valid)
        candidate.pooling.scale_(deep, token)
        measured = measure_tokens(candidate, valid, self.prepared.tokenizer)
        self._log(valid=measured.as_dict(), stacking={"deep": deep, "token": token})
        if measured.score <= self.best:
            self.since_best += 1
            return
        self.best, self.since_best = measured.score, 0
        card = _card(self.model, self.config, measured, self.step)
        weights.save(self.out / "checkpoint", candidate, self.prepared.tokenizer, card=card)

    def _log(self, **line: object) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, **line}) + "\n")

    def _resumable(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.classifier.named_parameters():
            yield f"model/{name}", parameter.data
            if not parameter.requires_grad:
                continue
            for key, value in self.optimizer.state[parameter].items():
                yield f"{key}/{name}", value
        for name, parameter in self.average.named_parameters():
            yield f"average/{name}", parameter.data

    def _save_resume(self) -> None:
        tensors = {name: x.detach().cpu().contiguous() for name, x in self._resumable()}
        tensors["run"] = torch.tensor([self.step, self.best, self.since_best], dtype=torch.float64)
        partial = self.out / "resume.safetensors.partial"
        save_file(tensors, partial)
        partial.replace(self.out / "resume.safetensors")

    def resume(self) -> None:
        """Go on where the last evaluation of an interrupted run left off."""
        tensors = load_file(self.out / "resume.safetensors", device=str(self.device))
        for parameter in filter(lambda p: p.requires_grad, self.classifier.parameters()):
            zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device if self.device.type == "cuda" else "cpu"),
                **zeros,
            }
        for name, tensor in self._resumable():
            tensor.copy_(tensors[name])
        step, self.best, since_best = tensors["run"].tolist()
        self.step, self.since_best = int(step), int(since_best)


def train(data: Path, out: Path, config: Path, *, resume: bool = False) -> Path:
    """Train a classifier and return the folder of its best checkpoint.

    ``data`` holds ``train*.jsonl(.zst)`` and ``valid*.jsonl(.zst)``, lines of ``{"text", "label"}``.
    ``out`` gets the prepared tokens, a log and the checkpoint; with ``resume`` an interrupted run
    in ``out`` goes on. Raises TrainingError or CorpusError before anything is trained.
    """
    model, training = read_config(config)
    if (out / "resume.safetensors").exists() != resume:
        problem = "holds no run to resume" if resume else "holds a run: resume it, or choose another"
        raise TrainingError(f"{out} {problem}")
    prepared = out / PREPARED
    if not (prepared / "labels.json").exists():
        vocab_size = model.get("vocab_size")
        if not isinstance(vocab_size, int):
            raise TrainingError(f"{config}: [model] needs vocab_size")
        Prepared.make(data, prepared, vocab_size)
    loaded = Prepared.load(prepared)
    try:
        architecture = ModelConfig.model_validate(
            {**model, "labels": loaded.labels, "vocab_size": loaded.tokenizer.vocab_size}
        )
    except ValidationError as error:
        raise TrainingError(f"{config}: {error}") from error
    run = Run(loaded, out, architecture, training)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with Progress(*columns, TimeRemainingColumn()) as progress:
        if resume:
            run.resume()
        else:
            run.fit_token_scores(progress)
        run.train(progress)
    return out / "checkpoint"


def _card(model: ModelConfig, config: TrainingConfig, measured: Measured, step: int) -> str:
    return "\n".join(
        [
            f"# {model.name}",
            "",
            f"A Gaussian Mixture Attention classifier (arXiv:2606.18283) with {len(model.labels)} labels,",
            f"{model.layers} layers of {model.width}; step {step} of {config.steps}, averaged weights.",
            "",
            "On the valid split:",
            "",
            measured.table(),
            "",
            "Training configuration:",
            "",
            "```json",
            config.model_dump_json(indent=2),
            "```",
            "",
        ]
    )
