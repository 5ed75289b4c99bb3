"""Training: labelled documents in, a checkpoint out."""

from __future__ import annotations

import copy
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
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gma.model import corpus, stacking, token_scores, weights
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig, problems
from gma.model.corpus import Corpus
from gma.model.crops import Crops
from gma.model.evaluate import Measured, measure_tokens
from gma.model.ops.chunked import Rows
from gma.model.token_scores import TokenScoresConfig
from gma.model.tokenizer import Tokenizer

SPLITS = "train", "valid"

PREPARED = "prepared"
"""Folder of a run: the tokenizer, the labels and the token ids of both splits."""

LOG = "log.jsonl"
RESUME = "resume.safetensors"
"""Files of a run: a line for each report, and all that it takes to go on."""

FROM_DATA = {"labels": "the train split's", "prior_tokens": "fitted to the valid split"}
"""Fields of the model that no configuration sets."""

LOG_EVERY = 20
"""Steps whose mean losses make a line of the log."""

LOGITS = 1 << 14
"""Tokens whose next-token logits, as many as the vocabulary, are in memory at a time."""

Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainingError(ValueError):
    """A run that can't start or go on; the message says why."""


class TrainingConfig(BaseModel):
    """How to train. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(gt=0)] = 1000
    tokens_per_step: Annotated[int, Field(gt=0)] = 65536
    lengths: Annotated[
        tuple[tuple[Fraction, Annotated[int, Field(gt=0)]], ...],
        Field(description="curriculum: (share of the steps done, tokens of a crop from there on)"),
    ] = ((0.0, 1024), (0.3, 4096))
    start_fraction: Annotated[
        Fraction, Field(description="crops that begin where their document begins")
    ] = 0.15
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    final_learning_rate: Annotated[Fraction, Field(description="as a share of learning_rate")] = (
        0.05
    )
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
    dropout: Annotated[
        float, Field(ge=0, lt=1, description="of the last layer's output, for the label's loss")
    ] = 0.1
    label_smoothing: Fraction = 0.1
    prefix: Annotated[
        int, Field(gt=0, description="the loss is taken after every so many tokens of a crop")
    ] = 256
    language_weight: Annotated[
        tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]],
        Field(description="weight of the next-token loss: at the start, and at the end (linear)"),
    ] = (1.0, 0.3)
    class_weight: Annotated[float, Field(ge=0, description="weight of the label's loss")] = 1.0
    average: Annotated[
        float,
        Field(ge=0, lt=1, description="decay a step of the averaged weights; 0: no averaging"),
    ] = 0.995
    evaluate_every: Annotated[int, Field(gt=0, description="steps")] = 200
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
        """Linear from the first to the last."""
        first, last = self.language_weight
        return first + (last - first) * step / self.steps


def read_config(file: Path) -> tuple[ModelConfig, TrainingConfig]:
    """A TOML file's tables: ``[model]`` and ``[training]``.

    The data has the last word on the model: ``labels`` are stand-ins, and ``vocab_size`` is how
    many tokens the tokenizer may have at most. Raises TrainingError that names what is wrong.
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
            raise TrainingError(f"{file}: [model] takes no {name}: they are {origin}")
    try:
        table = "model"
        architecture = ModelConfig.model_validate({**model, "labels": ("a", "b")})
        table = "training"
        return architecture, TrainingConfig.model_validate(training)
    except ValidationError as error:
        raise TrainingError(f"{file}, [{table}]: {problems(error)}") from error


@dataclass(frozen=True)
class Prepared:
    """What training reads: made once from the documents, kept in the run's folder."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    train: Corpus
    valid: Corpus

    @classmethod
    def make(cls, data: Path, out: Path, vocab_size: int) -> Prepared:
        """Train a tokenizer on the train split, encode both splits, and keep them in ``out``.

        What is there already is taken if it was made of the same files and for the same size.
        """
        splits = {split: corpus.files_of(data, split) for split in SPLITS}
        files = {file.name: file.stat().st_size for found in splits.values() for file in found}
        source = json.dumps({"vocab_size": vocab_size, "bytes": files}, indent=2)
        complete = out / "source.json"
        if complete.is_file() and complete.read_text() == source:
            return cls.load(out)
        complete.unlink(missing_ok=True)
        labels = tuple(sorted({document.label for document in corpus.read(data, "train")}))
        if len(labels) < 2:
            raise TrainingError(f"{data}: the train split has no label but {labels[0]!r}")
        tokenizer = Tokenizer.train((d.text for d in corpus.read(data, "train")), vocab_size)
        # Valid first: it is the smaller, and a label that it alone has is an error.
        valid = Corpus.encode(corpus.read(data, "valid"), tokenizer, labels)
        train = Corpus.encode(corpus.read(data, "train"), tokenizer, labels)
        out.mkdir(parents=True, exist_ok=True)
        train.save(out / "train.npz")
        valid.save(out / "valid.npz")
        tokenizer.save(out / "tokenizer.json")
        (out / "labels.json").write_text(json.dumps(labels))
        complete.write_text(source)
        return cls(tokenizer, labels, train, valid)

    @classmethod
    def load(cls, out: Path) -> Prepared:
        """Read what ``make`` left in ``out``."""
        return cls(
            Tokenizer.load(out / "tokenizer.json"),
            tuple(json.loads((out / "labels.json").read_text())),
            Corpus.load(out / "train.npz"),
            Corpus.load(out / "valid.npz"),
        )


class Losses(nn.Module):
    """Losses over a batch of crops: the label's at every prefix, and the next token's."""

    def __init__(self, classifier: Classifier, config: TrainingConfig) -> None:
        super().__init__()
        self.classifier = classifier
        self.config = config

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        """tokens and keep (B, N), lengths and labels (B,) -> label and next-token loss (2,)."""
        # Each crop is a document of one row, with nothing before it.
        which = torch.arange(len(tokens), device=tokens.device)
        rows = Rows.of(lengths, which, tokens.shape[1], torch.float32)
        embedded = self.classifier.embedding(tokens) * keep[..., None]
        hidden = self.classifier.hidden_alone(embedded, rows)
        with torch.autocast(tokens.device.type, enabled=False):
            label = self.label_loss(hidden.float(), labels, rows)
        return torch.stack([label, self.language_loss(hidden, tokens, rows)])

    def label_loss(self, hidden: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Mean over the prefixes of hidden (B, N, W), labels (B,).

        Of the deep scores alone: beside the tokens' own they would have little left to learn.
        """
        hidden = functional.dropout(hidden, self.config.dropout, training=self.training)
        there = rows.valid[..., None].float()
        scores = self.classifier.pooling.deep_scores(hidden) * there
        prefixes = self._up_to(scores) / self._up_to(there).clamp_min(1.0)
        return functional.cross_entropy(
            prefixes.flatten(0, 1),
            labels.repeat_interleave(prefixes.shape[1]),
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )

    def _up_to(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, prefixes, ...): sums over the first tokens."""
        return x.reshape(len(x), -1, self.config.prefix, x.shape[-1]).sum(2).cumsum(1)

    def language_loss(self, hidden: Tensor, tokens: Tensor, rows: Rows) -> Tensor:
        """Cross-entropy of each next token, hidden (B, N, W) scored by the embedding.

        0 for a bidirectional model, which has seen what it would have to guess.
        """
        if not self.classifier.config.causal or not any(self.config.language_weight):
            return hidden.new_zeros((), dtype=torch.float32)
        targets = tokens.roll(-1, 1).masked_fill(~rows.valid.roll(-1, 1), -100)
        targets[:, -1] = -100
        # Piece by piece and recomputed backward: the logits of all tokens would fill the memory.
        pieces = zip(
            torch.split(hidden.flatten(0, 1), LOGITS),
            torch.split(targets.flatten(), LOGITS),
            strict=True,
        )
        embedding = self.classifier.embedding.weight
        total = [checkpoint(_next_token, x, embedding, y, use_reentrant=False) for x, y in pieces]
        return torch.stack(total).sum() / (targets >= 0).sum().clamp_min(1)


def _next_token(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies: hidden (n, W), embedding (vocab, W), targets (n,), -100: none."""
    # Of norm 4: the embedding's entries begin near 0.5, so the logits near 2.
    normed = functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) * hidden.shape[-1] ** -0.5
    logits = functional.linear(normed * 4.0, embedding)
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


class Run:
    """One training run and its folder: ``log.jsonl``, ``resume.safetensors``, ``checkpoint/``.

    A step draws all that is random from the seed and its own number, so a resumed run ends where an
    uninterrupted one does.
    """

    def __init__(
        self, prepared: Prepared, out: Path, model: ModelConfig, config: TrainingConfig
    ) -> None:
        self.prepared, self.out, self.model, self.config = prepared, out, model, config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(config.seed)
        self.classifier = Classifier(model).to(self.device)
        self.classifier.choose_mixers()
        self.classifier.pooling.token.weight.requires_grad_(False)
        self.average = copy.deepcopy(self.classifier).requires_grad_(False).eval()
        self.crops = Crops(prepared.train, config.start_fraction, self.device)
        losses = Losses(self.classifier, config)
        self.losses = torch.compile(losses, dynamic=False) if config.compile else losses
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.rare = self._rare() if config.rare_dropout else None
        self.step = 0
        self.best, self.since_best = -math.inf, 0

    @property
    def stopped(self) -> bool:
        """Whether valid has not improved for ``patience`` evaluations."""
        return 0 < self.config.patience <= self.since_best

    def _groups(self) -> list[dict[str, object]]:
        """Matrices decay; norms, biases and mixtures do not; the tokens' own scores stay."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
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
        if not fitted.isfinite().all():
            raise TrainingError("the tokens' own scores diverged: lower their learning_rate")
        for classifier in self.classifier, self.average:
            classifier.pooling.token.weight.data.copy_(fitted)

    def train(self, progress: Progress) -> None:
        """Step by step to the end, or until valid has not improved for ``patience`` evaluations.

        Raises TrainingError if a loss is not finite.
        """
        bar = progress.add_task("training", total=self.config.steps, completed=self.step)
        started = time.monotonic()
        losses: list[Tensor] = []
        tokens: list[Tensor] = []
        while self.step < self.config.steps and not self.stopped:
            loss, read = self._train_step()
            losses.append(loss)
            tokens.append(read)
            self.step += 1
            progress.update(bar, advance=1)
            evaluating = self.step % self.config.evaluate_every == 0
            evaluating |= self.step == self.config.steps
            if evaluating or self.step % LOG_EVERY == 0:
                label, language = self._finite(losses)
                progress.update(bar, description=f"training, loss {label:.3f}")
                self._log(
                    label_loss=label,
                    language_loss=language,
                    tokens_per_second=round(
                        torch.stack(tokens).sum().item() / (time.monotonic() - started)
                    ),
                    length=self._length(self.step - 1),
                )
                losses.clear()
                tokens.clear()
                if evaluating:
                    self._evaluate()
                    self._save_resume()
                started = time.monotonic()
        if self.stopped:
            self._log(stopped=f"no better for {self.since_best} evaluations")

    def _finite(self, losses: list[Tensor]) -> tuple[float, float]:
        """Mean label and next-token loss of the last steps, (2,) each."""
        label, language = torch.stack(losses).mean(0).tolist()
        if not math.isfinite(label + language):
            raise TrainingError(
                f"the loss is no longer finite after {self.step} steps (label {label}, next token "
                f"{language}): lower learning_rate or gradient_clip and start another run"
            )
        return label, language

    def _length(self, step: int) -> int:
        """Tokens of a crop: as the curriculum says, but not far beyond the longest document."""
        prefix = self.config.prefix
        return min(self.config.length_at(step), -(-self.crops.longest // prefix) * prefix)

    def _train_step(self) -> tuple[Tensor, Tensor]:
        """Returns label and next-token loss (2,), and the tokens read ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        seeds = np.random.SeedSequence([self.config.seed, self.step])
        # For the hidden tokens and dropout.
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        length = self._length(self.step)
        rows = max(1, self.config.tokens_per_step // length)
        tokens, lengths, labels = self.crops.draw(np.random.default_rng(seeds), rows, length)
        keep = self._kept(tokens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses: Tensor = self.losses(tokens, lengths, labels, keep)
        weights = [self.config.class_weight, self.config.language_weight_at(self.step)]
        torch.autograd.backward(losses @ losses.new_tensor(weights))
        nn.utils.clip_grad_norm_(self.classifier.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Early on the average follows closely, or it would remember the random start.
        decay = min(self.config.average, (self.step + 1) / (self.step + 10))
        averaged: list[Tensor] = [*self.average.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(
                averaged,
                [*self.classifier.parameters()],
                1.0 - decay if self.config.average else 1.0,
            )
        return losses.detach(), lengths.sum()

    def _kept(self, tokens: Tensor) -> Tensor:
        """(B, N) float: 0 where a token is hidden; each crop draws its own share."""
        low, high = self.config.token_dropout
        share = low + (high - low) * torch.rand(len(tokens), 1, device=self.device)
        if self.rare is not None:
            share = torch.where(self.rare[tokens], self.config.rare_dropout, share)
        return (torch.rand(tokens.shape, device=self.device) >= share).float()

    def _evaluate(self) -> None:
        """Stack and measure the averaged weights; keep them if no evaluation so far was better."""
        candidate = copy.deepcopy(self.average)
        valid = self.prepared.valid
        stacked = stacking.fit(candidate, valid)
        stacking.apply(candidate, stacked)
        measured = measure_tokens(candidate, valid, self.prepared.tokenizer)
        self._log(valid=measured.as_dict(), stacking=stacked._asdict())
        if measured.score <= self.best:
            self.since_best += 1
            return
        self.best, self.since_best = measured.score, 0
        card = _card(self.model, self.config, measured, self.step)
        weights.save(self.out / "checkpoint", candidate, self.prepared.tokenizer, card=card)

    def _log(self, **line: object) -> None:
        with (self.out / LOG).open("a") as file:
            file.write(json.dumps({"step": self.step, **line}) + "\n")

    def _resumable(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that a run consists of beside its counters."""
        for name, parameter in self.classifier.named_parameters():
            yield f"model/{name}", parameter.data
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value
        for name, parameter in self.average.named_parameters():
            yield f"average/{name}", parameter.data

    def _save_resume(self) -> None:
        tensors = {name: x.detach().cpu().contiguous() for name, x in self._resumable()}
        tensors["run"] = torch.tensor([self.step, self.best, self.since_best], dtype=torch.float64)
        partial = self.out / f"{RESUME}.partial"
        save_file(tensors, partial, metadata={"config": self._described()})
        partial.replace(self.out / RESUME)

    def _described(self) -> str:
        """What a run can't change on its way."""
        fixed = self.config.model_dump(mode="json", exclude={"compile", "patience"})
        return json.dumps({"model": self.model.model_dump(mode="json"), "training": fixed})

    def resume(self) -> None:
        """Go on where the last evaluation of an interrupted run left off.

        Raises TrainingError if that run can't be read, or was another configuration's.
        """
        file = self.out / RESUME
        try:
            with safe_open(file, "pt") as opened:
                described = (opened.metadata() or {}).get("config")
            tensors = load_file(file, device=str(self.device))
        except SafetensorError as error:
            raise TrainingError(f"{file}: {error}") from error
        if described != self._described():
            raise TrainingError(f"{file} is of a run with another configuration")
        for parameter in filter(lambda p: p.requires_grad, self.classifier.parameters()):
            on_gpu = self.device.type == "cuda"
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device if on_gpu else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        for name, tensor in self._resumable():
            tensor.copy_(tensors[name])
        step, self.best, since_best = tensors["run"].tolist()
        self.step, self.since_best = int(step), int(since_best)
        self._forget_later_lines()

    def _forget_later_lines(self) -> None:
        """Take those lines off the log that this run is about to write again."""
        log = self.out / LOG
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if self._is_past(line)))

    def _is_past(self, line: str) -> bool:
        try:
            return bool(json.loads(line)["step"] <= self.step)
        except json.JSONDecodeError:  # half a line, when the run was interrupted
            return False


def train(data: Path, out: Path, config: Path, *, resume: bool = False) -> Path:
    """Train a classifier and return the folder of its best checkpoint.

    ``data`` holds ``train*.jsonl(.zst)`` and ``valid*.jsonl(.zst)``, lines of ``{"text", "label"}``
    each; ``config`` is a TOML file (``read_config``). ``out`` gets the prepared tokens, a log and
    the checkpoint that was best on valid; with ``resume`` an interrupted run in ``out`` goes on,
    and ``data`` is not read. Seeds torch's global generator.

    Raises TrainingError or CorpusError before anything is trained, TrainingError if it diverges.
    """
    if not resume:
        for split in SPLITS:  # the likeliest mistake, and named at once
            corpus.files_of(data, split)
    model, training = read_config(config)
    if (out / RESUME).exists() != resume:
        problem = (
            "holds no run to resume" if resume else "holds a run: resume it, or choose another"
        )
        raise TrainingError(f"{out} {problem}")
    if resume:
        prepared = Prepared.load(out / PREPARED)
    else:
        prepared = Prepared.make(data, out / PREPARED, model.vocab_size)
        (out / LOG).unlink(missing_ok=True)  # of a run that ended before its first evaluation
    vocab_size = prepared.tokenizer.vocab_size
    model = model.model_copy(update={"labels": prepared.labels, "vocab_size": vocab_size})
    run = Run(prepared, out, model, training)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        if resume:
            run.resume()
        else:
            run.fit_token_scores(progress)
        run.train(progress)
    return out / "checkpoint"


def _card(model: ModelConfig, config: TrainingConfig, measured: Measured, step: int) -> str:
    """The checkpoint's README.md."""
    return f"""# {model.name}

A Gaussian Mixture Attention classifier (arXiv:2606.18283) with {len(model.labels)} labels,
{model.layers} layers of {model.width}; step {step} of {config.steps}, averaged weights.

On the valid split:

{measured.table()}

Training configuration:

```json
{config.model_dump_json(indent=2)}
```
"""
