"""Documents that tell where their labels stand, and the losses that make something of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gma.model import weights
from gma.model.tokenizer import Tokenizer
from gma.model.training import factors, placing
from gma.model.training.corpus import Corpus, Spans
from gma.model.training.crops import Crops, Drawn
from gma.model.training.errors import CorpusError, TrainingError
from gma.model.training.evaluation import evaluate
from gma.model.training.labelled import LabelledText
from gma.model.training.passages import THOUSAND, Passages
from gma.model.training.train import train
from tests.model.small import ANY, small
from tests.model.training.documents import (
    configuration,
    documents,
    evaluations,
    interrupted,
    log_of,
    passages_in_noise,
    write,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data/train.jsonl", passages_in_noise(0, 32))
    write(tmp_path / "data/valid.jsonl", passages_in_noise(1, 16))
    return tmp_path / "data"


def trained(data: Path, out: Path, *, resume: bool = False, **training: Any) -> Path:
    given = {
        "steps": 60,
        "evaluate_every": 30,
        "tokens_per_step": 1024,
        "lengths": [[0.0, 128]],
        "prefix": 64,
        "learning_rate": 2e-2,
        "label_smoothing": 0.0,
        "language_weight": [0.0, 0.0],
        "model": {"pooling": "any"},
    }
    config = configuration(data / "any.toml", **{**given, **training})
    return train(data, out, config, resume=resume)


class TestTraining:
    def test_finds_what_there_is_and_where(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = trained(data, tmp_path / "run")
        checkpoint = weights.load(folder)
        assert checkpoint.config.pooling == "any"
        measured = evaluate(checkpoint, data, "valid")
        assert [view.prefix for view in measured.views] == [None]
        assert measured.views[0].figures["average_precision"] > 0.8
        assert measured.placing is not None
        assert measured.placing.pairs == 24
        assert measured.placing.hit_at_1 > 0.9
        assert "| windows of 1,000 bytes | " in measured.table()
        json.dumps(measured.as_dict(), allow_nan=False)
        assert "(24 labels that have spans): the best is right" in capsys.readouterr().err
        last = evaluations(folder)[-1]
        assert last["valid"]["placing"]["pairs"] == 24
        assert len(last["factors"]) == 3
        losses = [line["span_loss"] for line in log_of(folder) if "span_loss" in line]
        assert losses[-1] < losses[0] / 2

    def test_ends_where_it_would_have_without_an_interruption(
        self, data: Path, tmp_path: Path
    ) -> None:
        short: dict[str, Any] = {"steps": 4, "evaluate_every": 2}
        whole = trained(data, tmp_path / "whole", **short)
        with interrupted():
            trained(data, tmp_path / "again", **short)
        again = trained(data, tmp_path / "again", resume=True, **short)
        expected, found = (weights.load(x).classifier.state_dict() for x in (whole, again))
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name

    def test_without_their_weight_spans_are_not_looked_at(self, data: Path, tmp_path: Path) -> None:
        def end(out: str) -> dict[str, Tensor]:
            folder = trained(data, tmp_path / out, steps=2, evaluate_every=2, span_weight=0.0)
            return weights.load(folder).classifier.state_dict()

        with_spans = end("with")
        for seed, (split, count) in enumerate([("train", 32), ("valid", 16)]):
            lines = passages_in_noise(seed, count)
            write(data / f"{split}.jsonl", [{**line, "spans": []} for line in lines])
        for name, tensor in end("without").items():
            assert torch.equal(with_spans[name], tensor), name

    def test_refuses_documents_with_one_label(self, tmp_path: Path) -> None:
        write(tmp_path / "one/train.jsonl", documents(0, 4))
        write(tmp_path / "one/valid.jsonl", documents(1, 2))
        with pytest.raises(TrainingError, match="pooling any"):
            trained(tmp_path / "one", tmp_path / "run")


@pytest.mark.parametrize(
    ("span", "wrong"),
    [
        ("sea", "0 is no object"),
        ({"label": "sea", "start": 0}, "0 is no object with label, start, end"),
        ({"label": "farm", "start": 0, "end": 2}, "label 'farm' is none of the document's"),
        ({"label": ["sea"], "start": 0, "end": 2}, "is none of the document's"),
        ({"label": "sea", "start": 2, "end": 2}, "not in order"),
        ({"label": "sea", "start": -1, "end": 2}, "not in order"),
        ({"label": "sea", "start": 0, "end": 6}, "not in the text's 5 bytes"),
        ({"label": "sea", "start": 0.0, "end": 2}, "not in order"),
        ({"label": "sea", "start": True, "end": 2}, "not in order"),
        ({"label": "sea", "start": 0, "end": 3}, "byte 3 is inside a character"),
        ({"label": "sea", "start": 3, "end": 5}, "byte 3 is inside a character"),
    ],
)
def test_a_wrong_span_is_told(span: object, wrong: str) -> None:
    line: dict[str, object] = {"text": "abé!", "labels": ["sea"], "spans": [span]}
    with pytest.raises(CorpusError, match=f"x.jsonl, line 7: 'spans', .*{wrong}"):
        LabelledText.of(line, "x.jsonl, line 7")


def test_spans_that_are_no_list_are_told() -> None:
    with pytest.raises(CorpusError, match="'spans' is no list"):
        LabelledText.of({"text": "a", "labels": [], "spans": "b"}, "x")
    assert LabelledText.of({"text": "a", "labels": [], "spans": None}, "x").spans == ()


def test_spans_are_kept_as_tokens_and_bytes(tmp_path: Path) -> None:
    text = "one é two three. "
    tokenizer = Tokenizer.train(iter([text]), 400)  # of whole words: the span ends inside one
    start = text.encode().index(b"two")
    lines: list[dict[str, object]] = [
        {"text": "x", "labels": []},
        {
            "text": text,
            "labels": ["b"],
            "spans": [{"label": "b", "start": start, "end": start + 5}],
        },
    ]
    made = Corpus.encode((LabelledText.of(x, "x") for x in lines), tokenizer, ("a", "b"))
    made.save(tmp_path / "corpus.npz")
    spans = Corpus.load(tmp_path / "corpus.npz").spans
    assert (spans.document.tolist(), spans.label.tolist()) == ([1], [1])
    assert spans.bytes.tolist() == [[start, start + 5]]
    first, after = spans.tokens[0]
    lengths = tokenizer.byte_lengths[made[1]]
    assert lengths[:first].sum() <= start < lengths[: first + 1].sum()
    assert lengths[: after - 1].sum() < start + 5 <= lengths[:after].sum()


def drawn_by_hand() -> tuple[Tensor, Drawn, list[list[tuple[int, int, int]]]]:
    """Rates (3, 12, 3) of crops of 12, 9 and 12 tokens, and their spans."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(3, 12, 3, generator=generator, dtype=torch.float64) * 0.5
    rates[1, 9:] = 0.0
    spans = [
        [(0, 1, 3), (0, 2, 4), (1, -3, 2), (1, 6, 9)],  # one overlaps another, one began before
        [(2, 8, 14)],  # goes on behind the crop
        [],
    ]
    table = torch.full((3, 4, 3), -1)
    for row, own in zip(table, spans, strict=True):
        row[: len(own)] = torch.tensor(own).view(-1, 3)
    labels = torch.tensor([[1, 1, 1], [0, 0, 1], [1, 0, 0]]).bool()
    tokens = torch.zeros(3, 12, dtype=torch.long)
    return rates, Drawn(tokens, torch.tensor([12, 9, 12]), labels, table), spans


def test_the_loss_of_prefixes_is_as_defined() -> None:
    rates, drawn, spans = drawn_by_hand()
    losses = []
    for crop in range(3):
        for prefix in (4, 8, 12):
            end = min(prefix, int(drawn.lengths[crop]))
            for label in range(3):
                own = [x[1:] for x in spans[crop] if x[0] == label]
                has = bool(drawn.labels[crop, label])
                if not has:
                    target = False
                elif own and any(a >= 0 and b <= end for a, b in own):
                    target = True
                elif own and not any(b > 0 and a < end for a, b in own):
                    target = False
                elif not own and end == drawn.lengths[crop]:
                    target = True
                else:
                    continue
                p = -math.expm1(-float(rates[crop, :end, label].sum()))
                losses.append(-math.log(p if target else 1 - p))
    assert len(losses) == 27 - 1 - 2 - 2 - 2  # of label 1, of crop 0's 2, crop 1's 2, crop 2's 0
    found = Passages.of(rates, drawn).label_loss(4, 0.0, None)
    assert float(found) == pytest.approx(3 * np.mean(losses), rel=1e-9)


def test_the_loss_of_spans_is_as_defined() -> None:
    rates, drawn, spans = drawn_by_hand()
    total = 0.0
    for crop in range(2):  # the third has none
        length = int(drawn.lengths[crop])
        for label in range(3):
            own = [x[1:] for x in spans[crop] if x[0] == label]
            if drawn.labels[crop, label] and not own:
                continue
            total += sum(
                float(rates[crop, token, label])
                for token in range(length)
                if not any(a <= token < b for a, b in own)
            )
            total -= sum(
                math.log(-math.expm1(-float(rates[crop, a:b, label].sum())))
                for a, b in own
                if a >= 0 and b <= length
            )
    found = Passages.of(rates, drawn).span_loss()
    assert float(found) == pytest.approx(total / (12 + 9) * THOUSAND, rel=1e-9)


def test_gradients_are_finite_where_nothing_speaks() -> None:
    _, drawn, _ = drawn_by_hand()
    rates = torch.zeros(3, 12, 3, requires_grad=True)
    passages = Passages.of(rates, drawn)
    torch.autograd.backward(passages.label_loss(4, 0.0, None) + passages.span_loss())
    assert rates.grad is not None
    assert rates.grad.isfinite().all()


def test_crops_tell_where_their_documents_spans_are() -> None:
    ids = np.arange(60, dtype=np.uint16)
    rows = [(0, 1, 3, 5, 0, 0), (2, 0, 0, 2, 0, 0), (2, 1, 18, 20, 0, 0)]
    labels = np.array([[0, 1], [1, 1], [1, 1]], np.bool_)
    train = Corpus(ids, np.array([20, 40, 60]), labels, Spans.of(rows))
    crops = Crops(train, 0.0, torch.device("cpu"), spans=True)
    drawn = crops.draw(np.random.default_rng(0), 40, 7)
    assert drawn.spans.shape == (40, 2, 3)
    seen = set()
    for tokens, spans in zip(drawn.tokens, drawn.spans, strict=True):
        document, at = divmod(int(tokens[0]), 20)
        expected = [[x[1], x[2] - at, x[3] - at] for x in rows if x[0] == document]
        assert spans[: len(expected)].tolist() == expected
        assert (spans[len(expected) :, 0] == -1).all()
        seen.add(document)
    assert seen == {0, 1, 2}
    assert (
        Crops(train, 0.0, torch.device("cpu")).draw(np.random.default_rng(0), 3, 7).spans.numel()
        == 0
    )


class TestFactors:
    def documents(self, loud: float, count: int) -> tuple[Any, Corpus]:
        """A document is one token that says yes, or one that says no; one label is never there."""
        classifier = small(**ANY, vocab_size=2, labels=("a", "b"))
        classifier.pooling.deep.weight.zero_()
        classifier.pooling.deep.bias.zero_()
        classifier.pooling.factor.fill_(1.0)
        said = torch.tensor([0.2, 1.0]) * loud
        classifier.pooling.token.weight.copy_(torch.log(torch.expm1(said))[:, None].expand(2, 2))
        tokens = np.arange(count) % 2
        # As often as noisy-or of .2 and of 1 says, if loud is 1.
        share = np.where(tokens == 0, -np.expm1(-0.2), -np.expm1(-1.0))
        labels = np.stack([np.random.default_rng(0).random(count) < share, np.zeros(count) > 0], 1)
        return classifier, Corpus(tokens.astype(np.uint16), np.arange(1, count + 1), labels)

    def test_undo_what_is_too_loud(self) -> None:
        classifier, valid = self.documents(4.0, 2000)
        fitted = factors.fit(classifier, valid)
        assert fitted[0] == pytest.approx(0.25, rel=0.15)
        assert fitted[1] < 0.1
        before = classifier.pooling.factor.clone()
        factors.apply(classifier, fitted)
        torch.testing.assert_close(classifier.pooling.factor, before * torch.tensor(fitted))

    def test_few_documents_move_little(self) -> None:
        classifier, valid = self.documents(1.0, 4)
        assert all(0.3 < factor < 2.0 for factor in factors.fit(classifier, valid))


class TestPlacing:
    def test_windows_end_after_blanks_and_never_inside_characters(self) -> None:
        words = b"word " * 450
        assert placing.windows(words) == [1000, 2000, 2250]
        assert placing.windows(b"word\n" * 200 + b"x") == [1000, 1001]
        assert placing.windows("é".encode() * 700) == [1000, 1400]
        assert placing.windows(b"x" + "é".encode() * 700) == [999, 1401]
        long = b"a" * 899 + b" " + b"b" * 600
        assert placing.windows(long) == [1000, 1500]  # the blank stands before the last tenth
        assert placing.windows(b"a" * 900 + b" " + b"b" * 600) == [901, 1501]
        assert placing.windows(b"") == []

    def test_rankings(self) -> None:
        ranked = [np.array(x, np.bool_) for x in ([1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1])]
        found = placing.placing(ranked)
        assert found.pairs == 3
        assert found.hit_at_1 == pytest.approx(1 / 3)
        assert found.hit_at_3 == pytest.approx(2 / 3)
        assert found.average_precision == pytest.approx((0.75 + 1 / 3 + 1 / 4) / 3)

    @pytest.mark.parametrize("causal", [True, False])
    def test_of_a_model_that_hears_one_word(self, causal: bool) -> None:
        text = "sea " * 3 + "x " * 3000 + "sea " * 20 + "x " * 2000
        tokenizer = Tokenizer.train(iter([text]), 400)
        classifier = small(**ANY, vocab_size=tokenizer.vocab_size, causal=causal)
        classifier.pooling.deep.weight.zero_()
        own = classifier.pooling.token.weight.zero_()
        (word,) = {*tokenizer.encode("sea sea").tolist()[1:]} or {0}
        own[word] = 10.0
        tokens = tokenizer.encode(text)
        at = text.index("sea", 100)
        rows = [(0, 0, 0, 0, at + 8, at + 9), (0, 1, 0, 0, 9000, 9001), (0, 2, 0, 0, 1, 2)]
        found = placing.measure(classifier, [tokens], tokenizer, Spans.of(rows))
        assert found is not None
        assert found.pairs == 3
        assert found.hit_at_1 == pytest.approx(1 / 3)
        assert found.hit_at_3 == pytest.approx(2 / 3)  # the few at the start come second

    def test_a_token_is_of_the_window_that_it_ends_in(self) -> None:
        text = "a" * 999 + "b" + "a" * 1500
        tokenizer = Tokenizer.train(iter(["b"]), 400)  # no letter merges with another
        classifier = small(**ANY, vocab_size=tokenizer.vocab_size)
        classifier.pooling.deep.weight.zero_()
        own = classifier.pooling.token.weight.zero_()
        own[int(tokenizer.encode("b")[0])] = 20.0
        spans = Spans.of([(0, 0, 0, 0, 998, 1000)])
        found = placing.measure(classifier, [tokenizer.encode(text)], tokenizer, spans)
        assert found is not None
        assert found.hit_at_1 == 1.0

    def test_documents_without_spans_have_none(self) -> None:
        tokenizer = Tokenizer.train(iter(["x"]), 256)
        assert placing.measure(small(**ANY), [], tokenizer, Spans.of([])) is None
