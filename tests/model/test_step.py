"""The invariant: no answer depends on how its document was cut, or on what was beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gma.model.classifier import Classifier, Step
from gma.model.reading import read, read_cut
from gma.model.state import State
from tests.model import small as making
from tests.model.invariant import (
    Read,
    Share,
    as_double,
    assert_same,
    documents_of,
    one_shot,
    used_state,
)
from tests.model.small import ANY, SMALL, error

ROWS = 7

small = making.small

VARIANTS: dict[str, dict[str, object]] = {
    "usual": {},
    "no convolution": {"conv_kernel": 0},
    "two taps": {"conv_kernel": 2},
    "raw routing vectors": {"normalize_routing": False},
    "seven components": {"num_components": 7, "layers": 1},
    "one component, three heads": {"num_components": 1, "heads": 3},
    "forgetting": {"form": "forgetting"},
    "forgetting, one head": {"form": "forgetting", "heads": 1},
    "forgetting, raw routing vectors": {"form": "forgetting", "normalize_routing": False},
    "any": ANY,
    "any, forgetting": {**ANY, "form": "forgetting"},
}


@pytest.fixture(autouse=True, params=["layers", "kernels"])
def _what_reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The layers in PyTorch, or the kernels for the CPU in their place."""

    def with_kernels(**changes: object) -> Classifier:
        classifier = making.small(**changes)
        classifier.choose_mixers()
        assert not classifier.config.causal or classifier.mixers.startswith("C++")
        return classifier

    if request.param == "kernels":
        monkeypatch.setattr(sys.modules[__name__], "small", with_kernels)
    with torch.no_grad():
        yield


def read_in_steps(
    classifier: Classifier,
    documents: list[Tensor],
    states: State,
    chunk: int,
    rng: np.random.Generator,
) -> Read:
    """Read the documents in steps as wild as a step may be.

    Each takes some of the unfinished documents in any order, some rows of each, the last of them
    not always full, with unused rows anywhere between, all padded with what is no token.
    """
    states = states.gather(torch.arange(len(states.weight)))
    done = [0] * len(documents)
    shares: list[list[Share]] = [[] for _ in documents]
    while open_ := [i for i, document in enumerate(documents) if done[i] < len(document)]:
        chosen = rng.permutation(open_)[: rng.integers(1, ROWS)]
        # A step's documents have other indices than ours, and the last is nobody's.
        places = rng.permutation(ROWS)
        nobody = int(places[-1])
        inside = replace_nobody(states, chosen, places)
        tokens = torch.from_numpy(rng.integers(-(10**6), 10**6, (ROWS, chunk)))
        lengths = torch.zeros(ROWS, dtype=torch.long)
        document_of_row = torch.full((ROWS,), nobody)
        rows: list[tuple[int, int]] = []
        row = 0
        for position, document in enumerate(chosen.tolist()):
            later = len(chosen) - position - 1
            row += int(rng.random() < 0.3 and ROWS - row - later > 1)
            most = int(rng.integers(1, ROWS - row - later + 1))
            wanted = min(most * chunk, len(documents[document]) - done[document])
            if rng.random() < 0.3:
                wanted = int(rng.integers(1, wanted + 1))
            for start in range(0, wanted, chunk):
                size = min(chunk, wanted - start)
                begin = done[document]
                tokens[row, :size] = documents[document][begin : begin + size]
                lengths[row], document_of_row[row] = size, int(places[position])
                rows.append((row, document))
                done[document] += size
                row += 1
        step = classifier.step(tokens, lengths, document_of_row, inside, count=True)
        assert step.usage is not None
        for row, document in rows:
            share = Share(
                int(lengths[row]), step.evidence[row], float(step.weight[row]), step.usage[row]
            )
            shares[document].append(share)
        after = step.states.gather(torch.from_numpy(places[: len(chosen)]))
        states.scatter_(torch.from_numpy(chosen), after)
    return Read(shares, states)


def replace_nobody(states: State, chosen: np.ndarray, places: np.ndarray) -> State:
    """The step's states: the chosen documents' at their places, NaN at all others."""
    nothing = State(
        **{
            name: torch.full((ROWS, *x.shape[1:]), torch.nan, dtype=x.dtype)
            for name, x in states.tensors()
        }
    )
    taken = states.gather(torch.from_numpy(chosen))
    nothing.scatter_(torch.from_numpy(places[: len(chosen)]), taken)
    return nothing


@pytest.mark.parametrize("chunk", [3, 16, 63, 64, 65, 130, 1000])
def test_any_chunking_beside_any_others_is_the_one_shot(chunk: int) -> None:
    rng = np.random.default_rng(chunk)
    lengths = [1, 2, chunk - 1, chunk, chunk + 1, 63, 200 if chunk == 3 else 1000]
    documents = documents_of(lengths, rng)
    before = used_state(SMALL, len(documents), rng)
    classifier = small()
    found = read_in_steps(classifier, documents, before, chunk, rng)
    assert_same(classifier, documents, before, found, 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_architecture(variant: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    classifier = small(**VARIANTS[variant])
    documents = documents_of([1, 31, 32, 33, 300, 5], rng)
    before = used_state(classifier.config, len(documents), rng)
    if dtype == torch.float64:
        classifier, before = classifier.double(), as_double(before)
    found = read_in_steps(classifier, documents, before, 32, rng)
    assert_same(classifier, documents, before, found, 1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("chunk", [4, 37, 64, 500])
def test_from_nothing(chunk: int) -> None:
    """Where a document begins, memory and tail are zeros."""
    rng = np.random.default_rng(2)
    classifier = small()
    documents = documents_of([1, 3, 64, 400], rng)
    before = classifier.new_states(len(documents))
    found = read_in_steps(classifier, documents, before, chunk, rng)
    assert_same(classifier, documents, before, found, 1e-5)


@pytest.mark.parametrize("changes", [{}, ANY], ids=["mean", "any"])
def test_evidence_of_the_rows_is_the_logits(changes: dict[str, object]) -> None:
    rng = np.random.default_rng(3)
    classifier = small(**changes)
    (document,) = documents_of([500], rng)
    found = read_in_steps(classifier, [document], classifier.new_states(1), 17, rng)
    evidence = torch.stack([share.evidence for share in found.shares[0]]).double().sum(0)
    weight = torch.tensor(sum(share.weight for share in found.shares[0]))
    logits = classifier.logits(evidence, weight)
    expected = one_shot(classifier, document, classifier.new_states(1)).logits
    assert error(logits, expected) <= 1e-5
    of_state = classifier.logits(found.states.evidence, found.states.weight)[0]
    assert error(of_state, logits) <= 1e-12
    whole = read(classifier, [document], chunk=64)[0]
    assert error(whole.logits, expected) <= 1e-5


@pytest.mark.parametrize("changes", [{}, ANY], ids=["mean", "any"])
@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_read_of_several_is_each_alone(chunk: int, changes: dict[str, object]) -> None:
    rng = np.random.default_rng(4)
    classifier = small(**changes)
    documents = documents_of([1, 7, 8, 9, 100, 63], rng)
    together = read(classifier, documents, chunk=chunk, rows=4)
    for document, reading in zip(documents, together, strict=True):
        expected = one_shot(classifier, document, classifier.new_states(1))
        assert len(reading.evidence) == len(reading.weight) == -(-len(document) // chunk)
        assert error(reading.logits, expected.logits) <= 1e-5
        assert error(reading.usage, expected.usage) <= 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("changes", [{}, ANY], ids=["mean", "any"])
def test_where_a_document_is_cut_changes_nothing(causal: bool, changes: dict[str, object]) -> None:
    rng = np.random.default_rng(8)
    classifier = small(causal=causal, **changes)
    documents = documents_of([1, 90, 63], rng)
    cut = [[1], [5, 0, 31, 1, 53], [60, 3]]
    pieces = [torch.split(x, sizes) for x, sizes in zip(documents, cut, strict=True)]
    for document, sizes, found in zip(documents, cut, read_cut(classifier, pieces), strict=True):
        expected = one_shot(classifier, document, classifier.new_states(1))
        assert error(found.logits, expected.logits) <= 1e-5
        for mine, scores in zip(found.evidence, torch.split(expected.scores, sizes), strict=True):
            assert (mine - scores.sum(0)).abs().max() <= 1e-5 * expected.scores.abs().sum(0).max()


def step_of(classifier: Classifier, document: Tensor, chunk: int) -> Step:
    """One document in one step, one unused row after it."""
    rows = -(-len(document) // chunk) + 1
    tokens = torch.zeros(rows, chunk, dtype=torch.long)
    tokens.view(-1)[: len(document)] = document
    lengths = (len(document) - torch.arange(rows) * chunk).clamp(0, chunk)
    document_of_row = (lengths == 0).long()
    return classifier.step(tokens, lengths, document_of_row, classifier.new_states(rows))


@pytest.mark.parametrize("changed", [0, 1, 39, 40, 41, 255, 400])
def test_no_row_knows_a_later_token(changed: int) -> None:
    (document,) = documents_of([401], np.random.default_rng(5))
    classifier = small()
    before = step_of(classifier, document, 40).evidence
    document[changed] = (document[changed] + 1) % SMALL.vocab_size
    after = step_of(classifier, document, 40).evidence
    row = changed // 40
    assert torch.equal(after[:row], before[:row])
    # Every row from there on does: its tokens read what the changed one wrote.
    used = slice(row, 401 // 40 + 1)
    assert (after[used] != before[used]).any(1).all()


def test_no_token_knows_a_later_one_of_its_row() -> None:
    """A row of one token says the same as that token does at the start of a longer row."""
    (document,) = documents_of([64], np.random.default_rng(6))
    classifier = small()
    ends = [step_of(classifier, document[:n], 64).evidence[0] for n in range(1, 65)]
    each = torch.stack(ends).diff(dim=0, prepend=torch.zeros(1, len(SMALL.labels)))
    expected = one_shot(classifier, document, classifier.new_states(1)).scores
    assert error(each, expected) <= 1e-4  # differences of sums that are up to 64 times as large


class TestWhatIsNotThere:
    """Unused rows, padding, and documents that have no rows."""

    @pytest.fixture
    def states(self) -> State:
        return used_state(SMALL, 4, np.random.default_rng(7))

    def step(self, states: State, tokens: Tensor, lengths: list[int], rows: list[int]) -> Step:
        return small().step(tokens, torch.tensor(lengths), torch.tensor(rows), states)

    def test_padding_may_hold_any_ids(self, states: State) -> None:
        tokens = torch.randint(0, SMALL.vocab_size, (4, 16))
        other = torch.randint(-(10**6), 10**6, (4, 16))
        lengths, rows = [16, 5, 9, 0], [0, 0, 2, 1]
        there = torch.arange(16) < torch.tensor(lengths)[:, None]
        first = self.step(states, tokens, lengths, rows)
        second = self.step(states, torch.where(there, tokens, other), lengths, rows)
        assert torch.equal(first.evidence, second.evidence)
        assert torch.equal(first.weight, second.weight)
        for (name, mine), (_, others) in zip(
            first.states.tensors(), second.states.tensors(), strict=True
        ):
            assert torch.equal(mine, others), name

    def test_documents_without_rows_pass_unchanged(self, states: State) -> None:
        tokens = torch.randint(0, SMALL.vocab_size, (4, 16))
        step = self.step(states, tokens, [16, 1, 0, 0], [3, 3, 1, 1])
        for (name, before), (_, after) in zip(states.tensors(), step.states.tensors(), strict=True):
            assert torch.equal(before[:3], after[:3]), name
            assert not torch.equal(before[3], after[3]), name

    def test_a_step_of_nothing(self, states: State) -> None:
        step = self.step(states, torch.zeros(4, 16, dtype=torch.long), [0] * 4, [0] * 4)
        assert not step.evidence.any()
        assert not step.weight.any()
        for (name, before), (_, after) in zip(states.tensors(), step.states.tensors(), strict=True):
            assert torch.equal(before, after), name

    def test_states_that_were_never_written_stay_where_they_are(self, states: State) -> None:
        tokens = torch.randint(0, SMALL.vocab_size, (4, 16))
        lengths, rows = [16, 7, 0, 16], [2, 2, 1, 3]
        clean = self.step(states, tokens, lengths, rows)
        poisoned = replace(states, **{name: x.clone() for name, x in states.tensors()})
        for _, tensor in poisoned.tensors():
            tensor[:2] = torch.nan
        step = self.step(poisoned, tokens, lengths, rows)
        assert torch.equal(step.evidence, clean.evidence)
        assert torch.equal(step.weight, clean.weight)
        for (name, expected), (_, found) in zip(
            clean.states.tensors(), step.states.tensors(), strict=True
        ):
            assert torch.equal(found[2:], expected[2:]), name
            assert found[:2].isnan().all(), name


def test_a_chunk_smaller_than_the_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="at least conv_kernel - 1 = 3"):
        step_of(small(), torch.tensor([1, 2]), 2)


def test_an_empty_document_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        read(small(), [torch.tensor([1]), torch.tensor([], dtype=torch.long)])


def test_a_bidirectional_model_has_no_step() -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        step_of(small(causal=False), torch.tensor([1, 2]), 8)
