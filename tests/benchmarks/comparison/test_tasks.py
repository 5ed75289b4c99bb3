"""The tasks: what is asked has the right answer, and is the same for every mixer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.comparison import listops, states
from benchmarks.comparison.backbone import Backbone, Batch
from benchmarks.comparison.documents import Documents, Prefixes, Splits
from benchmarks.comparison.gaussian import MIXERS
from benchmarks.comparison.language import Language
from benchmarks.comparison.needle import COLOURS, Needle
from benchmarks.comparison.recall import Recall
from benchmarks.comparison.sizes import Size
from benchmarks.comparison.states import CUPS, SWAPS, States
from benchmarks.comparison.task import Recipe, Task
from benchmarks.comparison.texts import TOKENIZER, Texts
from benchmarks.comparison.trainer import OutOfTime, Trainer
from gma.model.tokenizer import Tokenizer

CPU = torch.device("cpu")


def recipe(vocabulary: int, tokens: int = 512, labels: int = 0) -> Recipe:
    return Recipe(Size(64, 1, vocabulary=vocabulary, labels=labels), 8, tokens)


def texts(lengths: list[int], vocabulary: int = 50) -> Texts:
    rng = np.random.default_rng(0)
    drawn = (rng.integers(vocabulary, size=n).astype(np.uint16) for n in lengths)
    return Texts.of(drawn, (n % 2 for n in range(len(lengths))))


class TestRecall:
    task = Recall(recipe(64), CPU, pairs=(4, 8), judged=16)

    def test_every_key_is_asked_for_its_value(self) -> None:
        batch = self.task.batch(0, 1)
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            value = dict(zip(tokens[:16:2], tokens[1:16:2], strict=True))
            assert len(value) == 8
            assert sorted(tokens[16:]) == sorted(value)
            assert targets == [-100] * 16 + [value[key] for key in tokens[16:]]

    def test_seeds_steps_and_splits_differ(self) -> None:
        drawn = [self.task.batch(*each).tokens for each in ((0, 0), (0, 2), (2, 0), (1, 0))]
        drawn += [next(self.task.examples(split))[1].tokens for split in ("valid", "test")]
        rows = {tuple(row) for tokens in drawn for row in tokens.tolist()}
        assert len(rows) == sum(map(len, drawn))
        assert torch.equal(self.task.batch(0, 0).tokens, drawn[0])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_states_say_where_the_ball_is(split: str) -> None:
    task = States(recipe(states.VOCABULARY), CPU, trained=16, judged=(37,), rows=8)
    ((_, batch),) = task.examples(split)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        ball = tokens[0] - len(SWAPS)
        places = [ball]
        for swap in tokens[1:]:
            one, other = SWAPS[swap]
            ball = {one: other, other: one}.get(ball, ball)
            places.append(ball)
        assert 0 <= min(places) <= max(places) < CUPS
        assert targets[18:] == [place + len(SWAPS) for place in places[18:]]
        assert set(targets[:18]) == {-100}


class TestListops:
    def test_values(self) -> None:
        documents = listops.documents(50, seed=0, least=5, most=60)
        for number, label in enumerate(documents.labels):
            tokens = documents.tokens[documents.starts[number] : documents.ends[number]]
            assert 5 < len(tokens) < 60
            assert _value(iter(tokens.tolist())) == label

    def test_a_seed_is_a_set_of_documents(self) -> None:
        first, again, other = (listops.documents(5, seed, 5, 60) for seed in (0, 0, 1))
        assert first.tokens.tobytes() == again.tokens.tobytes() != other.tokens.tobytes()


def _value(tokens: object) -> int:
    """Evaluate tokens by a stack, unlike what made them."""
    stack: list[list[int]] = [[]]
    for token in tokens:  # type: ignore[attr-defined]
        if token < 10:
            stack[-1].append(token)
        elif token == listops.CLOSE:
            operation, *values = stack.pop()
            stack[-1].append(_applied(operation, sorted(values)))
        else:
            stack.append([token - listops.OPEN])
    return stack[0][0]


def _applied(operation: int, ascending: list[int]) -> int:
    middle = ascending[len(ascending) // 2] + ascending[(len(ascending) - 1) // 2]
    return [ascending[0], ascending[-1], middle // 2, sum(ascending) % 10][operation]


class TestNeedle:
    tokenizer = Tokenizer.load(TOKENIZER)
    book = texts([3000], vocabulary=200)
    task = Needle(
        recipe(tokenizer.vocab_size, labels=8), book, {"test": book}, tokenizer, CPU,
        trained=(256,), judged={512: 4},
    )  # fmt: skip

    def test_the_fact_that_is_asked_for_is_there(self) -> None:
        batch = self.task.batch(0, 0)
        assert batch.tokens.shape == (2, 256)
        for tokens, label in zip(batch.tokens.numpy(), batch.targets.tolist(), strict=True):
            (thing,) = (
                i for i, q in enumerate(self.task.questions) if _holds(tokens[-len(q) :], q)
            )
            facts = [_holds(tokens, fact) for fact in self.task.facts[thing]]
            assert facts == [number == label for number in range(len(COLOURS))]

    def test_a_length_without_text_is_left_out(self) -> None:
        short = Needle(
            self.task.recipe, self.book, {"test": self.book}, self.tokenizer, CPU,
            judged={512: 4, 65536: 4},
        )  # fmt: skip
        assert {column for column, _ in short.examples("test")} == {"512 tokens"}


def _holds(tokens: NDArray[np.int64], part: NDArray[np.uint16]) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(part))
    return bool((windows == part).all(1).any())


class TestDocuments:
    splits = Splits(*(texts([3, 20, 40, 64, 90, 17, 33]) for _ in range(3)))
    task = Documents(recipe(50, labels=2), splits, 64, CPU)

    def test_all_are_judged_once_and_cut_at_the_longest(self) -> None:
        batches = [batch for _, batch in self.task.examples("valid")]
        lengths = sorted(n for batch in batches for n in batch.lengths.tolist())
        assert lengths == [3, 17, 20, 33, 40, 64, 64]
        assert sum(len(batch.targets) for batch in batches) == 7

    def test_documents_are_drawn_alike_and_with_their_labels(self) -> None:
        label = {document: n % 2 for n, document in enumerate(self._documents())}
        count = dict.fromkeys(label, 0)
        for step in range(400):
            batch = self.task.batch(0, step)
            for tokens, n, target in zip(*(x.tolist() for x in batch), strict=True):
                assert label[tuple(tokens[:n])] == target
                count[tuple(tokens[:n])] += 1
        assert max(count.values()) < 1.5 * min(count.values())

    def _documents(self) -> list[tuple[int, ...]]:
        train = self.splits.train
        ranges = zip(train.starts, train.ends, strict=True)
        return [tuple(train.tokens[a : min(b, a + 64)].tolist()) for a, b in ranges]


def test_prefixes_are_measured_in_bytes() -> None:
    splits = Splits(*(texts([600, 900]) for _ in range(3)))
    task = Prefixes(recipe(50, labels=2), splits, np.full(50, 4, np.int32), CPU, (1, 2))
    found = [(column, batch.lengths.tolist()) for column, batch in task.examples("test")]
    assert found == [("1 KB", [256, 256]), ("2 KB", [512]), ("2 KB", [512])]
    assert {task.batch(0, step).tokens.shape for step in range(2)} == {(2, 256), (1, 512)}


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    task, backbone = language(), model(50)
    torch.nn.init.zeros_(backbone.embedding.weight)
    found = task.evaluate(backbone, "test", Trainer(backbone, 1e-3))
    # All but the first token of each context, of 2 bytes each.
    assert found == {c: pytest.approx(math.log2(50) / 2) for c in task.columns}


def language() -> Language:
    text = texts([256, 300, 100])
    held_out = {split: {"books": text} for split in ("valid", "test")}
    return Language(recipe(50), [text], held_out, torch.full((50,), 2), CPU, (64, 256))


def model(vocabulary: int, mixer: str = "none") -> Backbone:
    torch.manual_seed(0)
    return Backbone(Size(64, 1, vocabulary=vocabulary), MIXERS[mixer])


def test_training_goes_from_the_short_to_the_long_context() -> None:
    task: Task = language()
    assert [tuple(task.batch(0, n).tokens.shape) for n in (0, 5, 6)] == [(8, 64), (8, 64), (2, 256)]


class TestTrainer:
    batch = Batch(torch.arange(40).view(2, 20), torch.tensor([20, 5]), torch.zeros(2).long())

    def test_text_of_a_causal_model_is_what_comes_next(self) -> None:
        text = Trainer(model(50), 1e-3).text(self.batch)
        assert torch.equal(text.tokens, self.batch.tokens)
        expected = [*range(1, 20), -100], [*range(21, 25), *[-100] * 16]
        assert text.targets.tolist() == [*expected]

    def test_text_of_one_that_reads_both_ways_is_what_is_hidden(self) -> None:
        text = Trainer(model(50, "softmax, both ways"), 1e-3).text(self.batch)
        hidden = text.tokens == 50
        assert 0 < hidden.sum() < 15
        assert not hidden[1, 5:].any()
        assert torch.equal(text.targets >= 0, hidden)
        assert torch.equal(torch.where(hidden, text.targets, text.tokens), self.batch.tokens)

    def test_it_stops_at_the_deadline(self) -> None:
        seen: list[int] = []

        def batch(step: int) -> Batch:
            seen.append(step)
            return self.batch._replace(targets=torch.zeros(2, 20).long())

        with pytest.raises(OutOfTime):
            Trainer(model(50), 1e-3, deadline=0.0).train(batch, 50)
        assert len(seen) < 20


def test_labels_come_from_a_documents_own_tokens() -> None:
    torch.manual_seed(0)
    backbone = Backbone(Size(64, 1, vocabulary=50, labels=3), MIXERS["softmax"])
    alone = torch.arange(12)[None]

    def scored(tokens: Tensor) -> Tensor:
        return backbone.label_logits(Batch(tokens, torch.tensor([12]), torch.zeros(1)))

    padded = torch.nn.functional.pad(alone, (0, 20), value=7)
    torch.testing.assert_close(scored(padded), scored(alone))
