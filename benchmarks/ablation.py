"""What each ingredient of the forgetting form is worth: models that differ in it alone.

    python -m benchmarks.ablation ../books --out build/ablation --seeds 0 1 2

Every model is trained for the next token, at 2,048 and then 16,384 tokens, and then for the label;
all see the same crops. Told are bits per byte on valid, and how often the deep scores find the
label after so many tokens of a crop of valid. A run that is in the folder already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.checkpoints import BOOKS
from benchmarks.timing import markdown, progress
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.layers import Layer
from gma.model.mixers import ForgettingMixer
from gma.model.ops.chunked import Rows, in_blocks, normalized, responsibilities, with_ones
from gma.model.ops.forgetting import MOST_FORGOTTEN
from gma.model.tokenizer import Tokenizer
from gma.model.training.config import TrainingConfig
from gma.model.training.corpus import Corpus
from gma.model.training.crops import Crops, Drawn
from gma.model.training.losses import Losses
from gma.model.training.splits import Splits

CONTEXTS = 2048, 16384
PREFIXES = 256, 1024, 4096, 8192


class Recipe(NamedTuple):
    """How long, and on how much, every model is trained."""

    steps: int = 260
    label_steps: int = 240
    tokens: int = 65536
    label_length: int = 8192
    evaluated: int = 64
    """Crops that are evaluated, in each of both ways."""


class Everything(ForgettingMixer):
    """The form with what others have beside it: a gate of what is written, and a norm of what is
    read, head by head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.strength = nn.Linear(config.width, config.heads)

    def causal(
        self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows that are whole documents.

        A weighted mean of values that counts some more than others is one mean by another: of the
        values times their strength, by that of the strengths.
        """
        (q, k, val), open_, keep = self.routed(x)
        strength = self.written(x)[..., None].to(val.dtype)
        size = val.shape[-1]
        both = functional.pad(torch.cat([strength * val, strength], -1), (0, size - 1))
        mixture, log_keep = self.mixture.coefficients(), self.log_keep(keep)
        with torch.autocast(x.device.type, enabled=False):
            out, _, _ = self.operation.forgetting(
                q, k, both, functional.pad(memory, (0, size)), mass, mixture, log_keep, rows,
                **self.settings,
            )  # fmt: skip
        out = out[..., :size].float() / (out[..., size : size + 1].float() + 1e-6)
        return self.update(out, open_), memory, mass

    def written(self, x: Tensor) -> Tensor:
        """How many times tokens x (R, C, W) are written, (R, C, H)."""
        return torch.sigmoid(self.strength(self.norm(x)))

    def update(self, out: Tensor, open_: Tensor) -> Tensor:
        return super().update(functional.rms_norm(out.float(), out.shape[-1:], eps=1e-6), open_)


class Joined(ForgettingMixer):
    """What is read is normalised, head by head; a share of the token's own value joins it; and both
    go through a SiLU in place of the sigmoid."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.skip = nn.Parameter(torch.ones(config.heads))

    def causal(
        self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        routed, gate, keep = self.project(self.norm(x)).split(self.parts, dim=-1)
        q, k, val = self.parted(routed)
        mixture, log_keep = self.mixture.coefficients(), self.log_keep(keep)
        with torch.autocast(x.device.type, enabled=False):
            out, memory, mass = self.operation.forgetting(
                q, k, val, memory, mass, mixture, log_keep, rows, **self.settings
            )
        wide = torch.promote_types(out.dtype, torch.float32)
        normal = functional.rms_norm(out.to(wide), out.shape[-1:], eps=1e-5)
        joined = normal + self.skip[:, None] * val.to(wide)
        return self.update(joined.to(gate.dtype), functional.silu(gate)), memory, mass


class WithoutForgetting(Everything):
    def log_keep(self, keep: Tensor) -> Tensor:
        return torch.zeros_like(super().log_keep(keep))


class WithoutWriteGate(Everything):
    def causal(
        self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ForgettingMixer.causal(self, x, memory, mass, rows)


class WithoutOutputGate(Everything):
    def update(self, out: Tensor, open_: Tensor) -> Tensor:
        return super().update(out, torch.ones_like(open_))


class WithoutNorm(Everything):
    def update(self, out: Tensor, open_: Tensor) -> Tensor:
        return ForgettingMixer.update(self, out, open_)


def keeping(heads: Callable[[int], int]) -> type[ForgettingMixer]:
    """Everything, and so many of the heads, of which it takes the number, forget nothing."""

    class Keeping(Everything):
        def __init__(self, config: ModelConfig) -> None:
            self.lasting = heads(config.heads)
            super().__init__(config)

    return Keeping


def forgetting_at_most(rate: float) -> type[ForgettingMixer]:
    class Bounded(Everything):
        def log_keep(self, keep: Tensor) -> Tensor:
            return super().log_keep(keep).clamp_min(-rate)

    return Bounded


class ByComponent(Everything):
    """Each component of a head forgets at a rate of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        heads, components = len(self.keep_bias), config.num_components
        self.parts[-1] = heads * components
        self.project = nn.Linear(config.width, sum(self.parts), bias=False)
        self.keep_bias = nn.Parameter(self.keep_bias.detach().repeat_interleave(components))

    def log_keep(self, keep: Tensor) -> Tensor:
        rates = functional.softplus(keep.float() + self.keep_bias).clamp_max(MOST_FORGOTTEN)
        config = self.config
        rates = rates.unflatten(-1, (-1, config.num_components))
        return functional.pad(-rates, (0, 0, config.heads - rates.shape[-2], 0))

    def causal(
        self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows that are whole documents."""
        (q, k, val), open_, keep = self.routed(x)
        mixture, normalize = self.mixture.coefficients(), self.config.normalize_routing
        log_keep, strength = self.log_keep(keep), self.written(x).float()
        with torch.autocast(x.device.type, enabled=False):
            there = rows.valid[:, None, :, None]
            upto = in_blocks(log_keep.transpose(1, 2).masked_fill(~there, 0.0)).cumsum(-2)
            gamma_q = in_blocks(responsibilities(q, mixture, normalize=normalize)) * upto.exp()
            gamma_k = responsibilities(k, mixture, normalize=normalize)
            gamma_k = (gamma_k * strength.transpose(1, 2)[..., None]).masked_fill(~there, 0.0)
            gamma_k = in_blocks(gamma_k) * (-upto).exp()
            values = in_blocks(with_ones(val, gamma_k.dtype))
            sums = gamma_k.transpose(-1, -2) @ values
            state, states = torch.zeros_like(sums[:, :, 0]), []
            for block in range(sums.shape[2]):
                states.append(state)
                left = upto[:, :, block, -1].exp()[..., None]
                state = left * (state + sums[:, :, block])
            affinity = (gamma_q @ gamma_k.transpose(-1, -2)).tril()
            summed = affinity @ values + gamma_q @ torch.stack(states, 2)
            out = normalized(summed.flatten(2, 3)[:, :, : q.shape[1]], self.config.epsilon)
        return self.update(out.to(x.dtype), open_), memory, mass


class Convolved(Everything):
    """Queries, keys and values are convolved, of rows that are whole documents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        taps = torch.randn(4, self.parts[0]) * 0.1
        taps[-1] += 1.0
        self.taps = nn.Parameter(taps)

    def parted(self, routed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chunk = routed.shape[1]
        seen = functional.pad(routed, (0, 0, len(self.taps) - 1, 0))
        convolved = sum(seen[:, i : i + chunk] * tap for i, tap in enumerate(self.taps))
        assert isinstance(convolved, Tensor)
        return super().parted(convolved.to(routed.dtype))


class Variant(NamedTuple):
    """A model: what is changed of the configuration, and its mixers."""

    changes: dict[str, Any]
    mixer: type[ForgettingMixer] | None = Everything


VARIANTS = {
    "the form of the paper": Variant({"form": "paper"}, None),
    "the forgetting form": Variant({}, ForgettingMixer),
    "with norm, own value and SiLU": Variant({}, Joined),
    "with norm and write gate": Variant({}),
    "... nothing forgotten": Variant({}, WithoutForgetting),
    "... no write gate": Variant({}, WithoutWriteGate),
    "... no norm": Variant({}, WithoutNorm),
    "... no output gate": Variant({}, WithoutOutputGate),
    "... no convolution": Variant({"conv_kernel": 0}),
    "... queries, keys and values convolved instead": Variant({"conv_kernel": 0}, Convolved),
    "... queries, keys and values convolved as well": Variant({}, Convolved),
    "... every head forgets": Variant({}, keeping(lambda heads: 0)),
    "... half of the heads keep all": Variant({}, keeping(lambda heads: heads // 2)),
    "... decay by component": Variant({}, ByComponent),
    "... half-life of 5.5 tokens at least": Variant({}, forgetting_at_most(1 / 8)),
    "... half-life of 11 tokens at least": Variant({}, forgetting_at_most(1 / 16)),
    **{f"... K {n}": Variant({"num_components": n}) for n in (8, 16, 64, 128)},
}
"""Those with three dots are that with norm and write gate but for one thing."""


def build(variant: Variant, tokenizer: Tokenizer, labels: tuple[str, ...]) -> Classifier:
    config = ModelConfig(
        name="ablation",
        labels=labels,
        vocab_size=tokenizer.vocab_size,
        width=384,
        layers=6,
        heads=6,
        routing_dim=32,
        value_dim=64,
        num_components=32,
        mlp_width=1024,
        form="forgetting",
    ).model_copy(update=variant.changes)
    classifier = Classifier(config)
    for layer in classifier.layers:
        assert isinstance(layer, Layer)
        if variant.mixer is not None:
            out = layer.mixer.out.weight
            layer.mixer = variant.mixer(config)
            layer.mixer.out.weight = out
    return classifier


class Run:
    """One model from its first step to its figures."""

    def __init__(self, classifier: Classifier, recipe: Recipe, train: Crops, seed: int) -> None:
        self.classifier, self.recipe, self.train, self.seed = classifier, recipe, train, seed
        self.device = train.tokens.device

    def language(self) -> None:
        """Train for the next token: three quarters of the steps at the short context."""
        config = TrainingConfig(steps=self.recipe.steps, dropout=0.0, prefix=256)
        lengths = [
            CONTEXTS[int(step >= 0.75 * self.recipe.steps)] for step in range(self.recipe.steps)
        ]
        self._steps(config, lengths, (0.0, 1.0))

    def label(self) -> None:
        """Train for the label, and for the next token beside it."""
        recipe = self.recipe
        config = TrainingConfig(steps=recipe.label_steps, learning_rate=1e-3, prefix=256)
        self._steps(config, [recipe.label_length] * recipe.label_steps, (1.0, 0.3))

    def _steps(
        self, config: TrainingConfig, lengths: list[int], weights: tuple[float, float]
    ) -> None:
        losses = Losses(self.classifier, config).train()
        parameters = [p for p in self.classifier.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        for step, length in enumerate(lengths):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            rng = np.random.default_rng([self.seed, step, len(lengths)])
            rows = max(1, self.recipe.tokens // length)
            drawn = self.train.draw(rng, rows, length)
            keep = torch.ones(drawn.tokens.shape, device=self.device)
            with self._narrow():
                each: Tensor = losses(drawn, keep)
            torch.autograd.backward(each @ each.new_tensor([*weights, 0.0]))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _narrow(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def bits_per_byte(self, tokens: Tensor, sizes: Tensor, context: int) -> float:
        """Of crops (B, N), read in pieces of `context` tokens; sizes (vocab,) are tokens' bytes."""
        losses = Losses(self.classifier, TrainingConfig(dropout=0.0)).eval()
        nats, size = 0.0, 0
        for crop in tokens:
            pieces = crop.view(-1, min(context, len(crop)))
            lengths = torch.full((len(pieces),), pieces.shape[1], device=self.device)
            keep = torch.ones(pieces.shape, device=self.device)
            labels = torch.zeros_like(lengths)
            spans = labels.new_empty(len(pieces), 0, 3)
            with self._narrow():
                each: Tensor = losses(Drawn(pieces, lengths, labels, spans), keep)
            nats += float(each[1]) * (pieces.numel() - len(pieces))
            size += int(sizes[pieces[:, 1:]].sum())
        return nats / math.log(2.0) / size

    @torch.no_grad()
    def accuracy(self, tokens: Tensor, labels: Tensor) -> list[float]:
        """How often the deep scores of the first tokens of crops (B, N) find the label."""
        classifier = self.classifier.eval()
        right = torch.zeros(len(PREFIXES))
        for crop, label in zip(tokens, labels, strict=True):
            length = torch.tensor([len(crop)], device=self.device)
            rows = Rows.of(length, torch.zeros_like(length), len(crop), torch.float32)
            with self._narrow():
                hidden = classifier.hidden_alone(classifier.embedding(crop[None]), rows)
            upto = classifier.pooling.deep_scores(hidden.float())[0].cumsum(0)
            for index, prefix in enumerate(PREFIXES):
                found = upto[min(prefix, len(upto)) - 1].argmax()
                right[index] += float(found == label) / len(tokens)
        return [round(float(x), 4) for x in right]


def measure(
    name: str, seed: int, recipe: Recipe, train: Crops, valid: Crops, tokenizer: Tokenizer,
    labels: tuple[str, ...],
) -> dict[str, Any]:  # fmt: skip
    """Train one model, and return what is told of it."""
    torch.manual_seed(seed)
    device = train.tokens.device
    classifier = build(VARIANTS[name], tokenizer, labels).to(device)
    classifier.pooling.token.weight.requires_grad_(False)
    if device.type == "cuda":
        classifier.choose_mixers()
    run = Run(classifier, recipe, train, seed)
    began = time.monotonic()
    run.language()
    seconds = time.monotonic() - began
    drawn = np.random.default_rng(0)
    long = valid.draw(drawn, recipe.evaluated, CONTEXTS[1]).tokens
    sizes = torch.from_numpy(tokenizer.byte_lengths).to(device)
    bits = [run.bits_per_byte(long, sizes, context) for context in CONTEXTS]
    run.label()
    crops, _, wanted, _ = valid.draw(drawn, 4 * recipe.evaluated, PREFIXES[-1])
    return {
        "variant": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "bits_per_byte": [round(x, 4) for x in bits],
        "accuracy": run.accuracy(crops, wanted),
        "tokens_per_s": round(recipe.steps * recipe.tokens / seconds),
    }


def table(found: Iterable[dict[str, Any]]) -> str:
    """Every variant's mean over its seeds, and the spread from least to most."""
    rows = []
    by_name: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        by_name.setdefault(each["variant"], []).append(each)
    for name in (name for name in VARIANTS if name in by_name):
        each = by_name[name]

        def told(key: str, place: int, digits: int, each: list[dict[str, Any]] = each) -> str:
            values = [run[key][place] for run in each]
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if values[1:] else ""
            return f"{sum(values) / len(values):.{digits}f}{spread}"

        rows.append(
            [name, f"{each[0]['parameters'] / 1e6:.1f}", str(len(each))]
            + [told("bits_per_byte", i, 4) for i in range(len(CONTEXTS))]
            + [told("accuracy", i, 3) for i in range(len(PREFIXES))]
        )
    head = ["", "M parameters", "seeds", *(f"bits/byte, {n:,}" for n in CONTEXTS)]
    return markdown([*head, *(f"label, {n:,}" for n in PREFIXES)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train*.jsonl.zst and valid*.jsonl.zst")
    parser.add_argument("--out", type=Path, default=Path("build/ablation"))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--quick", action="store_true", help="so few steps that it says nothing")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    recipe = Recipe(2, 1, 16384, 8192, 1) if args.quick else Recipe()
    tokenizer = Tokenizer.load(BOOKS / "tokenizer.json")
    args.out.mkdir(parents=True, exist_ok=True)
    corpora = []
    splits = "train", "valid"
    labels = tuple(
        sorted({each.label for split in splits for each in Splits(args.data).read(split)})
    )
    for split in splits:
        kept = args.out / f"{split}.npz"
        if not kept.exists():
            Corpus.encode(Splits(args.data).read(split), tokenizer, labels).save(kept)
        corpora.append(Crops(Corpus.load(kept), 0.0, device))
    for seed in args.seeds:
        for name in args.only:
            file = args.out / f"{'-'.join(name.strip('. ').split())}-{seed}.json"
            if file.exists():
                continue
            progress(f"{name}, seed {seed}")
            found = measure(name, seed, recipe, *corpora, tokenizer, labels)
            file.write_text(json.dumps(found))
            progress(json.dumps(found))
    files = sorted(args.out.glob("*-[0-9]*.json"))
    print(table(json.loads(file.read_text()) for file in files))


if __name__ == "__main__":
    main()
