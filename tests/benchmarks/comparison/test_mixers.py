"""Every mixer, on the backbone: what it may see, how large it is, and that it can be trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.comparison import agreement, recurrences
from benchmarks.comparison.backbone import Backbone, Batch, parameters
from benchmarks.comparison.gaussian import MIXERS
from benchmarks.comparison.mixers import GatedLinear, Mixer
from benchmarks.comparison.recall import Recall
from benchmarks.comparison.sizes import Size
from benchmarks.comparison.suite import RECIPES
from benchmarks.comparison.task import Recipe
from benchmarks.comparison.trainer import Trainer, next_tokens

CPU = torch.device("cpu")
SMALL = Size(128, 1, routing=16, components=16, vocabulary=20, labels=3)
CAUSAL = [name for name, mixer in MIXERS.items() if mixer.causal]
BOTH_WAYS = [name for name in MIXERS if name not in CAUSAL]


def model(name: str, size: Size = SMALL) -> Backbone:
    torch.manual_seed(0)
    return Backbone(size, MIXERS[name])


def documents(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(SMALL.vocabulary, (rows, tokens), generator=generator)
    return drawn, torch.full((rows,), tokens)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_changes_nothing_before(name: str) -> None:
    backbone = model(name).double()
    tokens, lengths = documents(2, 90)
    other = tokens.clone()
    other[:, 70:] = (other[:, 70:] + 1) % SMALL.vocabulary
    found, changed = (backbone.hidden(each, lengths) for each in (tokens, other))
    assert torch.equal(found[:, :70], changed[:, :70])
    assert not torch.isclose(found[:, 70:], changed[:, 70:]).all(-1).any()


@pytest.mark.parametrize("name", CAUSAL)
def test_an_early_token_is_seen_by_all_but_no_mixer(name: str) -> None:
    """By the backbone's own convolution it would be seen for three tokens."""
    backbone = model(name).double()
    tokens, lengths = documents(1, 40)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % SMALL.vocabulary
    found, changed = (backbone.hidden(each, lengths) for each in (tokens, other))
    assert bool((found[:, 30:] != changed[:, 30:]).any()) == (name != "none")


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_both_ways_all_of_a_document_is_seen_and_nothing_after(name: str) -> None:
    backbone = model(name).double()
    tokens, lengths = documents(2, 40)
    short = lengths - 10
    last, beyond = tokens.clone(), tokens.clone()
    last[:, 29] = (last[:, 29] + 1) % SMALL.vocabulary
    beyond[:, 30:] = (beyond[:, 30:] + 1) % SMALL.vocabulary
    found, seen, unseen = (backbone.hidden(x, short)[:, :20] for x in (tokens, last, beyond))
    assert (found != seen).any(-1).all()
    assert torch.equal(found, unseen)


@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize("name", MIXERS)
def test_parameters_are_matched(name: str, task: str) -> None:
    size = RECIPES[task].size
    with torch.device("meta"):
        own, reference = (parameters(Backbone(size, MIXERS[n])) for n in (name, CAUSAL[0]))
    assert own == pytest.approx(reference, rel=0.02)


@pytest.mark.parametrize("name", MIXERS)
def test_a_loss_falls(name: str) -> None:
    backbone = model(name)
    tokens = torch.arange(48).remainder(SMALL.vocabulary)[None].repeat(4, 1)
    lengths = torch.full((4,), 48)
    batch = Batch(tokens, lengths, next_tokens(tokens, lengths))
    trainer = Trainer(backbone, 4e-3)
    train = trainer.train if backbone.causal else trainer.pretrain
    losses = train(lambda step: batch, 16)
    assert losses[-1] < 0.7 * losses[0]


def test_softmax_learns_recall() -> None:
    size = Size(64, 1, vocabulary=16)
    task = Recall(Recipe(size, 150, 384), CPU, pairs=(4,), judged=256)
    backbone = model("softmax", size)
    trainer = Trainer(backbone, 8e-3)
    trainer.train(lambda step: task.batch(0, step), task.recipe.steps)
    assert task.evaluate(backbone, "test", trainer)["4 pairs"] > 0.9


class TestAgreement:
    @pytest.mark.parametrize("name", MIXERS)
    def test_a_mixer_agrees_with_itself(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = MIXERS[name].choose
        monkeypatch.setattr(MIXERS[name], "choose", lambda self, fast: plain(self, False))
        assert max(agreement.check(MIXERS[name], SMALL, CPU).values()) == 0

    def test_a_kernel_that_computes_something_else_is_found(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def wrong(q: Tensor, k: Tensor, val: Tensor, decay: Tensor) -> Tensor:
            return recurrences.gated(q, k + 0.1, val, decay)

        def choose(self: Mixer, fast: bool) -> None:
            Mixer.choose(self, False)
            if fast:
                gated = self.recurrences.gated
                wrong = self.recurrences._replace(
                    gated=lambda q, k, *x: gated(q, 1.05 * k + 0.1, *x)
                )
                self.recurrences = wrong

        monkeypatch.setattr(GatedLinear, "choose", choose)
        with pytest.raises(agreement.Disagreement, match="GatedLinear"):
            agreement.check(GatedLinear, SMALL, CPU)
