"""The kernels for the CPU in place of a model's layers. That they give the layers' answers is in
test_step.py; that other instructions do, in tests/export/test_library.py."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gma.model import backbone
from gma.model.classifier import Classifier, Step
from gma.model.ops.chunked import Rows
from gma.model.ops.cpu.library import Library, library
from gma.model.products import Precision
from gma.model.reading import read
from tests.model.small import ANY, error, small

FORMS = ["paper", "forgetting"]

NARROW: dict[Precision, float] = {"bfloat16": 1e-2, "int8": 2e-2}
"""Other precisions of products, and what answers and states may be off by."""


WIDE = {"width": 192, "heads": 3, "routing_dim": 32, "value_dim": 64, "mlp_width": 384}


@pytest.fixture(params=FORMS)
def classifier(request: pytest.FixtureRequest) -> Classifier:
    made = small(form=request.param)
    made.choose_mixers()
    assert made.mixers.startswith("C++")
    return made


def step_of(classifier: Classifier, rows: list[int], lengths: list[int]) -> Step:
    tokens = torch.arange(len(rows) * 300).reshape(len(rows), 300) * 7 % 50
    states = classifier.new_states(len(rows))
    return classifier.step(tokens, torch.tensor(lengths), torch.tensor(rows), states, count=True)


def by_layers(classifier: Classifier) -> Classifier:
    other = copy.deepcopy(classifier)
    other.kernels = None
    return other


@torch.no_grad()
def assert_as_layers(classifier: Classifier, tolerance: float = 1e-5) -> None:
    found = step_of(classifier, [0, 0, 1, 2], [300, 77, 1, 0])
    expected = step_of(by_layers(classifier).double(), [0, 0, 1, 2], [300, 77, 1, 0])
    assert found.usage is not None
    assert expected.usage is not None
    assert error(found.evidence, expected.evidence) <= tolerance
    assert error(found.usage, expected.usage) <= tolerance
    parts = zip(found.states.tensors(), expected.states.tensors(), strict=True)
    for (name, mine), (_, theirs) in parts:
        assert error(mine, theirs) <= tolerance, name


@pytest.mark.usefixtures("_poisoned")
def test_memory_that_nothing_was_written_to(classifier: Classifier) -> None:
    assert_as_layers(classifier)
    assert_as_layers(classifier)  # in buffers that the first step left


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("changes", [{}, WIDE], ids=["small", "wide"])
def test_other_precisions(form: str, precision: Precision, changes: dict[str, int]) -> None:
    classifier = small(form=form, **changes)
    classifier.choose_mixers(precision)
    assert classifier.precision == precision
    assert_as_layers(classifier, NARROW[precision])
    assert_as_layers(copy.deepcopy(classifier), NARROW[precision])
    with pytest.raises(AssertionError):  # they are other products
        assert_as_layers(classifier)


@pytest.mark.parametrize("precision", NARROW)
def test_other_precisions_in_other_chunks(precision: Precision) -> None:
    classifier = small(form="forgetting")
    classifier.choose_mixers(precision)
    texts = [torch.arange(n) * 11 % 50 for n in (1, 37, 500)]
    whole = read(classifier, texts, chunk=512)
    pieces = read(classifier, texts, chunk=37)
    for mine, theirs in zip(pieces, whole, strict=True):
        assert error(mine.logits, theirs.logits) <= NARROW[precision]


@pytest.mark.parametrize("precision", NARROW)
def test_no_other_precision_without_the_kernels(
    monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    for unfit in (small(causal=False, form="paper"), small().double()):
        with pytest.raises(ValueError, match=f"{precision} needs the kernels for CPUs: they read "):
            unfit.choose_mixers(precision)
    monkeypatch.setattr(backbone, "library", lambda: "they were not compiled")
    with pytest.raises(ValueError, match="for CPUs: they were not compiled"):
        small().choose_mixers(precision)


@pytest.mark.parametrize("precision", ["float32", *NARROW])
@pytest.mark.parametrize("change", ["in place", "loaded", "replaced", "replaced often"])
def test_weights_that_change(classifier: Classifier, change: str, precision: Precision) -> None:
    """A model that is trained is measured between steps."""
    classifier.choose_mixers(precision)
    with torch.no_grad():
        before = step_of(classifier, [0], [300]).evidence
        other = small(form=classifier.config.form)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        if change == "in place":
            for mine, theirs in zip(classifier.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
        elif change == "loaded":
            classifier.load_state_dict(other.state_dict())
        elif change == "replaced":
            classifier.load_state_dict(other.state_dict(), assign=True)
        else:  # what is freed may be given out again
            for _ in range(20):
                step_of(classifier, [0], [300])
                for factor in (3.0, 0.5):
                    up = classifier.get_parameter("layers.0.mlp.up.weight")
                    changed = torch.nn.Parameter(up * factor)
                    classifier.get_submodule("layers.0.mlp.up").weight = changed
                    del up, changed
                assert_as_layers(classifier, NARROW.get(precision, 1e-5))
        assert error(step_of(classifier, [0], [300]).evidence, before) > 0.01
    assert_as_layers(classifier, NARROW.get(precision, 1e-5))


def test_gradients_are_those_of_the_layers(classifier: Classifier) -> None:
    weight = classifier.embedding.weight
    gradients = []
    for each in (classifier, by_layers(classifier)):
        each.requires_grad_()
        loss = step_of(each, [0], [300]).evidence.sum()
        torch.autograd.backward(loss)
        assert each.embedding.weight.grad is not None
        gradients.append(each.embedding.weight.grad)
    assert torch.equal(*gradients)
    assert weight.grad is not None


def test_in_float64_the_layers_read(classifier: Classifier) -> None:
    with torch.no_grad():
        found = step_of(classifier.double(), [0], [300])
    assert found.evidence.dtype == torch.float64


def test_threads_do_not_disturb_each_other(classifier: Classifier) -> None:
    texts = [torch.arange(n) * 11 % 50 for n in (1, 300, 1000, 2500) * 4]
    alone = [read(classifier, [text], chunk=128)[0].logits for text in texts]
    with ThreadPoolExecutor(4) as pool:
        beside = [*pool.map(lambda text: read(classifier, [text], chunk=128)[0].logits, texts)]
    for mine, theirs in zip(beside, alone, strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def threads() -> Iterator[None]:
    """As many that a document's rows are shared among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("precision", "chunk", "changes"),
    [
        ("float32", 300, {}),
        ("float32", 300, {**WIDE, **ANY}),
        ("float32", 37, {}),
        ("float32", 100, {**WIDE, **ANY, "labels": tuple(map(str, range(26)))}),
        # Sizes that leave something over everywhere.
        ("float32", 5, {"labels": ("a", "b"), "width": 29, "mlp_width": 31, "value_dim": 13}),
        ("float32", 16, {**ANY, "width": 29, "mlp_width": 145, "routing_dim": 17}),
        # Not in bfloat16, whose sums PyTorch's library makes in an order of its own.
        ("int8", 60, WIDE),
        ("int8", 37, {"width": 29, "mlp_width": 530}),
    ],
)
def test_what_shares_a_step_changes_no_bit(
    form: str, precision: Precision, chunk: int, changes: dict[str, Any]
) -> None:
    """Whichever rows are read together, of one document or of several."""
    classifier = small(form=form, **changes)
    classifier.choose_mixers(precision)
    # Scores of all sizes: numbers that are all alike may be rounded alike.
    classifier.pooling.token.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    lengths = [8 * chunk, 1, 3 * chunk + 1, 5, 2 * chunk + 11, chunk, 4 * chunk - 1, 13]
    tokens = torch.zeros(8, 8, chunk, dtype=torch.long)
    for row, length in zip(tokens.flatten(1), lengths, strict=True):
        row[:length] = torch.arange(length) * 7 % 50
    filled = (torch.tensor(lengths)[:, None] - torch.arange(8) * chunk).clamp(0, chunk)
    owners = torch.arange(8)[:, None].expand(8, 8)
    with torch.no_grad():
        whole = classifier.step(
            tokens.flatten(0, 1), filled.flatten(), owners.flatten(), classifier.new_states(64)
        )
        for document, of_rows in enumerate(whole.evidence.view(8, 8, -1)):
            states = classifier.new_states(1)
            for row, length, together in zip(
                tokens[document], filled[document], of_rows, strict=True
            ):
                alone = classifier.step(row[None], length[None], torch.tensor([0]), states)
                states = alone.states
                assert torch.equal(alone.evidence[0], together)
            for (name, mine), (_, theirs) in zip(
                states.tensors(), whole.states.tensors(), strict=True
            ):
                assert torch.equal(mine[0], theirs[document]), name


def test_rates_that_are_small_add_up() -> None:
    """1e-5 a token and 1e-8: most of the one and all of the other is lost beside 1 in float32."""
    classifier = small(**ANY)
    classifier.choose_mixers()
    said = torch.tensor([-11.0, -18.0, 50.0])
    with torch.no_grad():
        classifier.pooling.deep.weight.zero_()
        classifier.pooling.token.weight.zero_()
        classifier.pooling.deep.bias.copy_(said)
        found = step_of(classifier, [0], [300]).evidence[0]
    expected = 300 * said.double().exp().log1p() * classifier.pooling.factor
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("precision", ["float32", *NARROW])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_document_that_is_not_finite_spoils_no_other(
    classifier: Classifier, precision: Precision, number: float
) -> None:
    classifier.choose_mixers(precision)
    with torch.no_grad():
        classifier.embedding.weight[49] = number
        tokens, lengths = torch.zeros(3, 64, dtype=torch.long), torch.tensor([64, 64, 64])
        tokens[1, 5] = 49
        step = classifier.step(tokens, lengths, torch.arange(3), classifier.new_states(3))
        finite = step.evidence.isfinite().all(1)
        memory = step.states.memory.flatten(1).isfinite().all(1)
    assert finite.tolist() == memory.tolist() == [True, False, True]


def test_rows_that_lie_apart_in_memory(classifier: Classifier) -> None:
    tokens = torch.arange(600).reshape(2, 300) * 7 % 50
    both = torch.tensor([[300, 0], [77, 0]])
    states = classifier.new_states(2)
    with torch.no_grad():
        apart = classifier.step(tokens, both[:, 0], both[:, 1], states)
        whole = classifier.step(tokens, both[:, 0].clone(), both[:, 1].clone(), states)
        alike = classifier.step(tokens, torch.tensor(5).expand(2), torch.arange(2), states)
    assert torch.equal(apart.evidence, whole.evidence)
    assert alike.weight.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("part", ["memory", "mass", "tail"])
@pytest.mark.parametrize("change", ["half", "double", "fewer documents", "another model"])
def test_states_that_are_not_the_models(classifier: Classifier, part: str, change: str) -> None:
    """Kernels would read and write beyond them."""
    states = classifier.new_states(2)
    given = getattr(states, part)
    changed = {
        "half": given.half(),
        "double": given.double(),
        "fewer documents": given[:1],
        "another model": given[..., :-1],
    }[change]
    states = replace(states, **{part: changed})
    tokens = torch.zeros(2, 300, dtype=torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{part} is torch"):
        classifier.step(tokens, torch.tensor([300, 1]), torch.arange(2), states)


def test_a_copy_takes_no_buffers_along(classifier: Classifier) -> None:
    before = len(pickle.dumps(classifier))
    with torch.no_grad():
        step_of(classifier, [0, 1], [300, 300])
    assert len(pickle.dumps(classifier)) == before
    assert_as_layers(copy.deepcopy(classifier))


def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gma.model.ops.cpu.library.VERSION", 0)
    with pytest.raises(ValueError, match="of another version: install"):
        Library()


@pytest.mark.parametrize(
    ("lengths", "rows", "message"),
    [
        ([301, 1], [0, 1], "a length"),
        ([-1, 1], [0, 1], "a length"),
        ([1, 1], [0, 2], "no document"),
        ([7, 7], [0, 0], "not full"),
        ([1, 1], [-1, 0], "no document"),
        ([300, 1], [0, 1], "more or fewer tokens"),
    ],
)
def test_rows_that_are_none(lengths: list[int], rows: list[int], message: str) -> None:
    """The library looks at them before it reads or writes anything."""
    found = library()
    assert isinstance(found, Library)
    x, mask = torch.zeros(300, 16), torch.ones(2, 300, dtype=torch.bool)
    tails, ones = torch.zeros(2, 3, 16), torch.ones(4, 16)
    given = _rows(torch.tensor(lengths), mask, torch.tensor(rows))
    with pytest.raises(ValueError, match=message):
        found.convolve(x, ones[0], ones, (tails, tails.clone()), given, x, x, 1e-6)


def _rows(lengths: Tensor, valid: Tensor, document: Tensor) -> Rows:
    return Rows(lengths, valid, document, *[torch.zeros(0)] * 5)


def test_where_there_is_none_the_layers_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backbone, "library", lambda: "they were not compiled")
    classifier = small()
    with caplog.at_level(logging.WARNING):
        classifier.choose_mixers()
    assert classifier.mixers == "chunked"
    assert "reading is slower without the kernels" in caplog.text
    assert "they were not compiled" in caplog.text


def test_other_instructions() -> None:
    """Those that every processor has."""
    code = """
from itertools import product
from tests.model.small import ANY, small
from tests.model.test_cpu import FORMS, assert_as_layers
for changes, form in product(({}, ANY, {"conv_kernel": 0}), FORMS):
    made = small(**changes, form=form)
    made.choose_mixers()
    assert made.mixers == "C++ for baseline", made.mixers
    assert_as_layers(made)
"""
    environment = os.environ | {"GMA_OPS_INSTRUCTIONS": "baseline"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_set_of_instructions_that_there_is_not() -> None:
    code = "from gma.model.ops.cpu.library import library; print(library())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=os.environ | {"GMA_OPS_INSTRUCTIONS": "mmx"},
        capture_output=True,
        text=True,
    )
    assert "GMA_OPS_INSTRUCTIONS=mmx" in found.stdout
