"""The tokens' own scores: a softmax regression, or a logistic one for each label, on the
tokens' shares of a crop.

A bag of words over the whole document is hard to beat where there is much text and little of it was
trained on, and it takes seconds to fit. The deep scores are trained beside it.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from gma.model.config import ModelConfig
from gma.model.training.corpus import Corpus
from gma.model.training.crops import Crops
from gma.model.training.cross_entropy import cross_entropy


class TokenScoresConfig(BaseModel):
    """How to fit the tokens' own scores. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    steps: Annotated[int, Field(ge=0, description="0 leaves them out")] = 450
    crops: Annotated[int, Field(gt=0, description="crops of a step")] = 512
    length: Annotated[int, Field(gt=0, description="tokens of a crop")] = 1024
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    scale: Annotated[
        float,
        Field(
            gt=0,
            description="factor of the scores: few tokens of a crop tell anything, and must shout",
        ),
    ] = 25.0
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.3
    decay: Annotated[float, Field(ge=0, description="L2 penalty of the unscaled scores")] = 1e-6
    seed: Annotated[int, Field(ge=0)] = 0


def fit(
    crops: Crops, train: Corpus, model: ModelConfig, config: TokenScoresConfig, progress: Progress
) -> Tensor:
    """Fit scores (vocab_size, labels) whose mean over a crop's tokens predicts its label or labels.

    The rarer a token, the larger its steps (the root of its inverse document frequency). ``train``
    is what ``crops`` crops.
    """
    device = crops.tokens.device
    used = train.document_frequency(model.vocab_size)
    rarity = np.sqrt(np.log((1 + len(train)) / (1 + used)) + 1)
    scale = torch.from_numpy(config.scale * rarity).float().to(device)[:, None]
    scores = torch.zeros(model.vocab_size, len(model.labels), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([scores], betas=(0.9, 0.99), weight_decay=config.decay)
    rates = None if crops.rates is None else torch.from_numpy(crops.rates).to(device)
    length = min(config.length, crops.longest)
    bar = progress.add_task("token scores", total=config.steps)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        rng = np.random.default_rng([config.seed, step])
        tokens, lengths, labels, _ = crops.draw(rng, config.crops, length)
        valid = torch.arange(length, device=device) < lengths[:, None]
        shares = valid / lengths[:, None]
        logits = functional.embedding_bag(
            tokens, scores * scale, per_sample_weights=shares.float(), mode="sum"
        )
        smoothing = config.label_smoothing
        loss = cross_entropy(logits, labels, smoothing=smoothing, rates=rates).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        progress.update(bar, advance=1, description=f"token scores, loss {loss.item():.3f}")
    return (scores * scale).detach()
