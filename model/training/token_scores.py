"""The tokens' own scores: logistic regression for each label, on the tokens of a crop.

A linear model of words over the whole document is hard to beat where little text was trained on,
and it takes seconds to fit. One looks at which tokens a crop has, as is best for topics and
sentiment in short texts, one at their shares of it, as for an author's style in long ones. How much
the scores of each are held back, and what each counts for in their sum, is chosen on the valid
split. The deep scores are trained beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from gma.model.config import ModelConfig
from gma.model.training.corpus import Corpus
from gma.model.training.crops import Crops
from gma.model.training.cross_entropy import cross_entropy
from gma.model.training.least import least

Counted = Literal["presence", "share"]
"""What a crop is told by: which tokens it has, or how much of it each is."""

HOLDS: dict[Counted, tuple[float, ...]] = {
    "presence": (3.0, 1.0, 10.0, 0.3, 30.0, 0.1),
    "share": (0.06, 0.3, 1.5, 0.012, 6.0, 30.0),
}
"""Decays that are tried, times the crops that train would be cut into; likely ones first."""

MOST_WEIGHTS = 1 << 23
"""Scores that are fitted side by side, of all decays: beyond, fewer decays are tried."""

LOUDNESS = 25.0
"""What shares are multiplied by: few tokens of a crop tell anything, and must shout."""

PREFIXES = 256, 1024, None
"""Tokens of a valid document that a decay is judged on; None: all."""


class TokenScoresConfig(BaseModel):
    """How to fit the tokens' own scores. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    steps: Annotated[int, Field(ge=0, description="0 leaves them out")] = 400
    crops: Annotated[int, Field(gt=0, description="crops of a step")] = 512
    length: Annotated[int, Field(gt=0, description="tokens of a crop")] = 1024
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.1
    counted: Annotated[
        Counted | None,
        Field(
            description="which tokens a crop has, or how much of it each is; if nothing is said, "
            "both, weighed on valid"
        ),
    ] = None
    decay: Annotated[
        float | None,
        Field(ge=0, description="L2 penalty; chosen on valid if nothing is said"),
    ] = None
    seed: Annotated[int, Field(ge=0)] = 0


class TokenScores(NamedTuple):
    """What was fitted."""

    scores: Tensor  # (vocab_size, labels): their mean over a document's tokens is its logits
    parts: dict[Counted, Part]


class Part(NamedTuple):
    """Scores by what is counted."""

    decay: float
    weight: float  # in the sum of all
    tried: dict[float, float]  # by decay, the cross-entropy on valid


def fit(
    crops: Crops,
    train: Corpus,
    valid: Corpus,
    model: ModelConfig,
    config: TokenScoresConfig,
    progress: Progress,
) -> TokenScores:
    """Fit scores whose mean over a document's tokens predicts its label or labels.

    ``train`` is what ``crops`` crops; ``valid`` chooses the decays, and how loud the mean is.
    """
    rarity = _rarity(train, model.vocab_size).to(crops.tokens.device)
    counted: Sequence[Counted] = [*HOLDS] if config.counted is None else [config.counted]
    tables, chosen, tried = [], [], []
    for each in counted:
        decays = _decays(train, model, config, each)
        fitted = _regressed(crops, rarity, each, decays, model, config, progress)
        scaled, losses = _scaled(fitted, valid, crops, model)
        best = int(losses.nan_to_num(torch.inf).argmin())
        tables.append(scaled[:, best])
        chosen.append(decays[best])
        tried.append(dict(zip(decays, losses.tolist(), strict=True)))
    scores, weights = _weighed(torch.stack(tables, 1), valid, crops, model)
    parts = map(Part, chosen, weights, tried)
    return TokenScores(scores, dict(zip(counted, parts, strict=True)))


def _decays(
    train: Corpus, model: ModelConfig, config: TokenScoresConfig, counted: Counted
) -> list[float]:
    if config.decay is not None:
        return [config.decay]
    sizes = np.diff(train.ends, prepend=0)
    count = int((-(-sizes // config.length)).sum())
    room = max(1, MOST_WEIGHTS // (model.vocab_size * len(model.labels)))
    return [hold / count for hold in HOLDS[counted][:room]]


def _rarity(train: Corpus, vocab_size: int) -> Tensor:
    """Return each token's inverse document frequency, (vocab_size,)."""
    used = train.document_frequency(vocab_size)
    return torch.from_numpy(np.log((1 + len(train)) / (1 + used)) + 1).float()


def _regressed(
    crops: Crops,
    rarity: Tensor,
    counted: Counted,
    decays: list[float],
    model: ModelConfig,
    config: TokenScoresConfig,
    progress: Progress,
) -> Tensor:
    """Fit scores (vocab_size, decays, labels), all decays at once."""
    weights = LOUDNESS * rarity if counted == "share" else rarity**1.5
    device, shape = weights.device, (len(decays), len(model.labels))
    scores = torch.zeros(len(weights), *shape, device=device).flatten(1).requires_grad_()
    bias = torch.zeros(*shape, device=device, requires_grad=True)
    held = torch.tensor(decays, device=device).repeat_interleave(shape[1])
    optimizer = torch.optim.Adam([scores, bias], betas=(0.9, 0.99))
    rates = None if crops.rates is None else torch.from_numpy(crops.rates).to(device)
    length = min(config.length, crops.longest)
    bar = progress.add_task("token scores", total=config.steps)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        rng = np.random.default_rng([config.seed, step])
        drawn = crops.draw(rng, config.crops, length)
        tokens, times, counts = distinct(drawn.tokens, drawn.lengths, len(weights))
        row = torch.repeat_interleave(counts)
        weight = weights[tokens]
        if counted == "share":
            weight = weight * times / drawn.lengths[row]
        else:  # of length 1: long and short documents teach alike
            square = torch.zeros(len(counts), device=device).index_add_(0, row, weight.square())
            weight = weight / square.sqrt()[row]
        starts = counts.cumsum(0) - counts
        each = functional.embedding_bag(
            tokens, scores, starts, per_sample_weights=weight, mode="sum"
        )
        losses = cross_entropy(
            (each.view(-1, *shape) + bias).flatten(0, 1),
            drawn.labels.repeat_interleave(len(decays), 0),
            smoothing=config.label_smoothing,
            rates=rates,
        )
        loss = losses.sum() / config.crops
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        assert scores.grad is not None
        scores.grad.addcmul_(scores.detach(), held)
        optimizer.step()
        shown = f"token scores, loss {loss.item() / len(decays):.3f}"
        progress.update(bar, advance=1, description=shown)
    return (scores.detach() * weights[:, None]).view(-1, *shape)


def distinct(tokens: Tensor, lengths: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct tokens of rows (B, N), row after row, how often each is there, and how
    many each row has, (B,)."""
    there = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    row = torch.arange(len(tokens), device=tokens.device)[:, None]
    found, times = torch.unique((row * vocab_size + tokens)[there], return_counts=True)
    return found % vocab_size, times, (found // vocab_size).bincount(minlength=len(tokens))


def _scaled(
    fitted: Tensor, valid: Corpus, crops: Crops, model: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Make means of scores (vocab_size, decays, labels) logits of valid's documents.

    Returns the scores that do, and the loss of each decay on valid, (decays,). Each label is to
    count as it does in the crops: an offset must not make the rare ones silent.
    """
    means = torch.cat([*_means(fitted, valid)]).double()
    # Where valid's tokens are all unknown, their mean says nothing of how loud it is.
    quiet = 0.01 * fitted.square().mean((0, 2)).sqrt().double() + 1e-6
    loud = means.square().mean((0, 2)).sqrt().maximum(quiet)
    loss, stay = _loss(valid, crops, fitted.device), 0.5 / len(valid)

    def losses(x: Tensor) -> Tensor:
        logits = means * (x[:, :1].exp() / loud[:, None]) + x[:, 1:]
        return torch.stack([loss(of_decay) for of_decay in logits.unbind(1)])

    start = means.new_zeros(fitted.shape[1], 1 + len(model.labels))
    x = least(lambda x: losses(x).sum() + stay * x.square().sum(), start)
    factors, offsets = x[:, :1].exp() / loud[:, None], x[:, 1:]
    return fitted * factors.float() + offsets.float(), losses(x)


def _weighed(
    tables: Tensor, valid: Corpus, crops: Crops, model: ModelConfig
) -> tuple[Tensor, list[float]]:
    """Weigh scores (vocab_size, T, labels) against one another on valid's documents.

    Returns their sum (vocab_size, labels), and what each was multiplied by: T numbers. One that
    diverged is left out, unless all did.
    """
    there = tables.isfinite().all(2).all(0)
    tables = tables.where(there[:, None], 0.0) if there.any() else tables
    means = torch.cat([*_means(tables, valid)]).double()
    loss, stay = _loss(valid, crops, tables.device), 0.5 / len(valid)
    alike = means.new_full((tables.shape[1],), 1 / tables.shape[1])

    def held(x: Tensor) -> Tensor:
        factors = alike * x[: len(alike)].exp()
        logits = (means * factors[:, None]).sum(1) + x[len(alike) :]
        return loss(logits) + stay * x.square().sum()

    x = least(held, means.new_zeros(len(alike) + len(model.labels)))
    factors = alike * x[: len(alike)].exp() * there
    scores = (tables * factors[:, None].float()).sum(1) + x[len(alike) :].float()
    return scores, factors.tolist()


def _loss(valid: Corpus, crops: Crops, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what takes logits of all views of valid's documents to their cross-entropy."""
    labels = torch.from_numpy(np.concatenate([valid.labels] * len(PREFIXES))).to(device)
    share = _shares(valid, crops).to(device).repeat(len(PREFIXES)) / len(PREFIXES)
    return lambda logits: (cross_entropy(logits, labels) * share).sum()


def _means(fitted: Tensor, valid: Corpus) -> Iterator[Tensor]:
    """Yield the mean scores (documents, decays, labels) of each of ``PREFIXES``."""
    for prefix in PREFIXES:
        cut = [valid[i][:prefix].astype(np.int64) for i in range(len(valid))]
        ends = np.cumsum([len(tokens) for tokens in cut])
        bags = functional.embedding_bag(
            torch.from_numpy(np.concatenate(cut)).to(fitted.device),
            fitted.flatten(1),
            torch.from_numpy(np.append(0, ends[:-1])).to(fitted.device),
            mode="mean",
        )
        yield bags.view(-1, *fitted.shape[1:])


def _shares(valid: Corpus, crops: Crops) -> Tensor:
    """Say how much each valid document counts, (documents,), in all 1."""
    share: NDArray[np.float64] = np.full(len(valid), 1.0)
    if not valid.multi_label:
        labels, counts = np.unique(valid.labels, return_counts=True)
        # Labels in the order of the crops' groups, of which train has every one.
        share = (crops.shares[labels] / counts)[np.searchsorted(labels, valid.labels)]
    return torch.from_numpy(share / share.sum())
