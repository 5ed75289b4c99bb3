"""Classification from Python: what `from gma import Classifier` answers, and that others answer the
same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

import gma
from gma import Answer, Classifier
from gma.model import weights
from gma.model.classifier import Classifier as Module
from gma.model.config import ModelConfig
from gma.model.tokenizer import Tokenizer
from gma.service.cli.main import main

TEXT = "It was the best of times, it was the worst of times; é 你好 👍.\n"
TEXTS = [TEXT, TEXT * 300, "x", TEXT * 20, "\ufeff" + TEXT, TEXT * 40]
AGREEMENT = Path(__file__).parents[2] / "docs" / "examples" / "agreement.txt"
CLAUSES = {
    "anti_assignment": "Neither party may assign",
    "audit_rights": "have these books and records inspected",
    "cap_on_liability": "TOTAL LIABILITY",
    "ip_ownership_assignment": "hereby assigns",
    "termination_for_convenience": "for any reason or for no reason",
    "uncapped_liability": "IN NO EVENT SHALL",
    "warranty_duration": "ninety (90) days",
}
LABELS = ("austen", "dickens", "poe", "twain")

KINDS: dict[str, dict[str, Any]] = {
    "one label": {},
    "bidirectional": {"causal": False},
    "may say none": {"thresholds": (0.0, 1.0, 1.0, 0.0)},
    "multi-label": {"multi_label": True, "thresholds": (0.1, 0.5, 0.9, 1.0)},
}


def folder_of(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(iter([TEXT]), vocab_size=300)
    config = ModelConfig(
        name="tiny",
        labels=LABELS,
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=1,
        heads=2,
        routing_dim=4,
        value_dim=8,
        num_components=4,
        mlp_width=32,
        prior_tokens=20.0,
        **changes,
    )
    module = Module(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    weights.save(folder, module, tokenizer, card="# tiny")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("checkpoint"), **KINDS[request.param])


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return Classifier.load(folder, device="cpu")


def same(one: Answer, other: Answer) -> None:
    assert (one.bytes, one.tokens, one.labels) == (other.bytes, other.tokens, other.labels)
    for x, y in zip(one.scores, other.scores, strict=True):
        assert (x.label, x.threshold) == (y.label, y.threshold)
        assert x.logit == pytest.approx(y.logit, abs=1e-5)
        assert x.score == pytest.approx(y.score, abs=1e-5)
    for a, b in zip(one.evidence, other.evidence, strict=True):
        assert (a.start, a.end, a.tokens, a.labels) == (b.start, b.end, b.tokens, b.labels)
        assert a.weight == pytest.approx(b.weight)


class TestClassify:
    def test_many_at_once_are_each_alone(self, classifier: Classifier) -> None:
        answers = classifier.classify(iter(TEXTS), evidence=True)
        for text, answer in zip(TEXTS, answers, strict=True):
            same(answer, classifier.classify(text, evidence=True))
            assert answer.bytes == len(text.encode())
            assert answer.model == "tiny"

    def test_it_is_what_the_command_says(
        self,
        classifier: Classifier,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "texts.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
        )
        command = ["gma", "classify", "--json", "--evidence", "--components"]
        command += ["--checkpoint", str(folder), str(tmp_path / "texts.jsonl")]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit):
            main()
        lines = capsys.readouterr().out.splitlines()
        answers = classifier.classify(TEXTS, evidence=True, components=True)
        for answer, line in zip(answers, lines, strict=True):
            told = Answer.of(json.loads(line))
            same(answer, told)
            assert answer.components is not None
            assert torch.tensor(answer.components) == pytest.approx(
                torch.tensor(told.components), abs=1e-3
            )

    def test_labels_are_those_that_reach_their_threshold(self, classifier: Classifier) -> None:
        answer = classifier.classify(TEXT)
        reached = [each.label for each in answer.scores if each.score >= (each.threshold or 0)]
        if not classifier.config.multi_label:
            reached = [label for label in reached if label == answer.scores[0].label]
        assert answer.labels == tuple(reached)
        assert answer.label == (reached[0] if reached else None)

    def test_evidence_tiles_the_text_and_sums_to_the_answer(self, classifier: Classifier) -> None:
        text = "\ufeff" + TEXT * 100
        answer = classifier.classify(text, evidence=True)
        spans = answer.evidence
        assert len(spans) > 1
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == answer.bytes == len(text.encode())
        assert "".join(span.of(text) for span in spans).replace("\ufeff", "") in text
        for score in answer.scores:
            parts = (
                span.weight * each.logit
                for span in spans
                for each in span.scores
                if each.label == score.label
            )
            assert sum(parts) == pytest.approx(score.logit, abs=1e-4)

    def test_options(self, classifier: Classifier) -> None:
        text = TEXT * 200
        answer = classifier.classify(text, top_k=2, max_tokens=1000, evidence=True, spans=3)
        assert (len(answer.scores), answer.tokens, answer.truncated) == (2, 1000, True)
        assert 1 < len(answer.evidence) <= 3
        plain = classifier.classify(text)
        assert (plain.evidence, plain.components, plain.truncated) == ((), None, False)

    @pytest.mark.parametrize(
        ("texts", "error"),
        [
            ("", "the document is empty"),
            (["a", ""], "text 1 is empty"),
            ("\ud800", "surrogates"),
        ],
    )
    def test_what_is_no_text(self, classifier: Classifier, texts: str, error: str) -> None:
        with pytest.raises(ValueError, match=error):
            classifier.classify(texts)

    def test_bytes_are_no_text(self, classifier: Classifier) -> None:
        with pytest.raises(TypeError, match="text 0 is no string"):
            classifier.classify([b"abc"])  # type: ignore[list-item]

    def test_no_texts(self, classifier: Classifier) -> None:
        assert classifier.classify([]) == []

    def test_a_notebook_shows_them(self, classifier: Classifier) -> None:
        answer = classifier.classify(TEXT * 40, evidence=True)
        hostile = tuple(replace(each, label=f"<{each.label}&>") for each in answer.scores)
        for given, bars in (
            (answer, len(answer.evidence)),
            (replace(answer, scores=hostile, evidence=()), 0),
        ):
            page = ET.fromstring(f"<div>{given._repr_html_()}</div>")  # noqa: S314
            _, *rows = page.iter("tr")
            assert [row[0].text for row in rows] == [each.label for each in given.scores]
            for row, score in zip(rows, given.scores, strict=True):
                assert row[1].text == f"{score.score:.3f}"
                assert len(list(row.iter("rect"))) == bars

    def test_answers_are_frozen(self, classifier: Classifier) -> None:
        with pytest.raises(FrozenInstanceError):
            classifier.classify("a").label = "poe"  # type: ignore[misc]


class TestStream:
    @pytest.mark.parametrize("cut", [1, 1000, 10**6])
    def test_it_answers_what_the_whole_would(self, classifier: Classifier, cut: int) -> None:
        data = (TEXT * 40).encode()
        with classifier.stream() as document:
            for start in range(0, len(data), cut):
                document.write(data[start : start + cut])
        same(document.answer(evidence=True), classifier.classify(TEXT * 40, evidence=True))

    def test_the_answer_so_far_is_that_of_the_text_so_far(self, classifier: Classifier) -> None:
        with classifier.stream() as document:
            for end in range(1, 90):
                document.write(TEXT)
                if end in (1, 2, 30, 88, 89):
                    so_far = document.answer(evidence=True)
                    same(so_far, classifier.classify(TEXT * end, evidence=True))

    def test_a_character_that_is_not_whole_yet(self, classifier: Classifier) -> None:
        with classifier.stream() as document:
            document.write(b"abc" + "é".encode()[:1])
            assert document.answer().bytes == 3
            document.write("é".encode()[1:])
        assert document.answer().bytes == 5

    def test_a_character_that_never_is(self, classifier: Classifier) -> None:
        with pytest.raises(ValueError, match="at byte 3"), classifier.stream() as document:
            document.write(b"abc\xc3")

    def test_nothing_was_written(self, classifier: Classifier) -> None:
        with classifier.stream() as document:
            with pytest.raises(ValueError, match="empty"):
                document.answer()
            document.write("a")
            assert document.answer().tokens == 1

    def test_it_has_ended(self, classifier: Classifier) -> None:
        with classifier.stream() as document:
            document.write("a")
        with pytest.raises(ValueError, match="has ended"):
            document.write("b")

    def test_max_tokens(self, classifier: Classifier) -> None:
        with classifier.stream(max_tokens=1000) as document:
            for _ in range(10):
                document.write(TEXT * 30)
            assert document.truncated
        same(document.answer(), classifier.classify(TEXT * 300, max_tokens=1000))
        assert document.answer().truncated


def test_the_default_checkpoint_has_a_name() -> None:
    one, other = Classifier.load(), Classifier.load("contracts")
    assert one.checkpoint.fingerprint == other.checkpoint.fingerprint
    assert "jack_london" in Classifier.load("books").labels


def test_the_default_checkpoint_finds_clauses_and_where_they_are() -> None:
    """In an agreement that nothing was trained on, nor chosen by."""
    text = AGREEMENT.read_text()
    answer = Classifier.load().classify(text, evidence=True)
    assert set(answer.labels) == CLAUSES.keys()
    for label, words in CLAUSES.items():
        start = text.index(words)  # in bytes too: the agreement is ASCII
        _, span = max(
            (score.score, span)
            for span in answer.evidence
            for score in span.scores
            if score.label == label
        )
        assert span.start < start + len(words), label
        assert start < span.end, label


@pytest.mark.parametrize("name", ["no_such", "../books", "checkpoints/books"])
def test_what_is_no_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not a checkpoint: there is no such folder"):
        Classifier.load(name)


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "books")
    assert Classifier.load("books").config.name == "tiny"


def test_importing_gma_imports_no_torch() -> None:
    code = "import gma, sys; assert 'torch' not in sys.modules; gma.Answer; print(gma.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_that_is_offered_is_there() -> None:
    for name in gma.__all__:
        assert getattr(gma, name).__name__ == name
