"""The fused step against the float64 definition: interpreted where no GPU is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.fused.obstacles import FusedPrecision
from gma.model.state import State
from tests.model.invariant import Read, Share, assert_near, assert_same, documents_of, used_state
from tests.model.small import ANY, error, small

pytest.importorskip("triton")

from gma.model.fused.buffers import Inputs, Outputs
from gma.model.fused.step import FusedStep
from tests.interpreting import DEVICE, KERNELS

pytestmark = [*KERNELS, pytest.mark.usefixtures("_poisoned")]

FITTING = {
    "width": 32,
    "layers": 1,
    "routing_dim": 16,
    "value_dim": 16,
    "num_components": 16,
    "mlp_width": 48,
}
"""The smallest sizes of the kernels, and nothing that divides a tile."""

PRECISIONS: tuple[FusedPrecision, ...] = "float32", "bfloat16", "fp8"

Rows = Sequence[int]
"""Tokens of each of a document's rows in a step."""


def fitting(**changes: object) -> Classifier:
    """With weights that lose nothing as bfloat16, and components so narrow that all is told apart.

    What the step folds into others is a power of two.
    """
    classifier = small(**{**FITTING, **changes})
    for name, parameter in classifier.named_parameters():
        if name.endswith("omega"):
            parameter.sub_(5.0)
        elif name.endswith("norm.weight"):
            parameter.copy_(torch.randn(parameter.shape).round().clamp(-1.0, 1.0).exp2())
        elif parameter.ndim == 2:
            parameter.copy_(parameter.bfloat16())
    return classifier


class Reader:
    """A fused step, and slots of which half are other documents' and half hold NaN.

    The documents of `before` go on from there, but those of which nothing was read are fresh.
    """

    def __init__(
        self,
        classifier: Classifier,
        documents: Sequence[Tensor],
        before: State,
        *,
        rows: int,
        chunk: int,
        precision: FusedPrecision = "bfloat16",
        count: bool = False,
    ) -> None:
        self.count = count
        self.classifier = copy.deepcopy(classifier).to(DEVICE)
        self.step = FusedStep(self.classifier, rows=rows, chunk=chunk, precision=precision)
        self.chunk, self.documents = chunk, documents
        self.rng = np.random.default_rng(rows * chunk)
        slots = 2 * len(documents) + 2
        self.states = used_state(classifier.config, slots, self.rng).to(DEVICE)
        self.slots = self.rng.permutation(slots)[: len(documents)]
        for slot in range(0, slots, 2):
            self._poison(slot)
        self.done = [0] * len(documents)
        self.begun = before.weight > 0
        for document, slot in enumerate(self.slots):
            self._poison(slot)
            if self.begun[document]:
                self.states.scatter_(
                    self._at(slot), before.gather(torch.tensor([document])).to(DEVICE)
                )
        self.shares: list[list[Share]] = [[] for _ in documents]
        labels = len(classifier.config.labels)
        self.logits = torch.zeros(len(documents), labels, dtype=torch.float64)

    def read(self, grid_rows: int, plan: dict[int, Rows]) -> None:
        """A step of these documents in this order, unused rows anywhere between."""
        inputs = Inputs.empty((grid_rows, self.chunk), "cpu")
        # Any ids where no token is; what documents without rows are said to be counts for nothing.
        inputs.tokens.copy_(self._random(self.classifier.config.vocab_size, grid_rows, self.chunk))
        inputs.slots.copy_(self._random(len(self.states.weight), grid_rows))
        inputs.first_row.copy_(self._random(grid_rows + 1, grid_rows))
        inputs.fresh.copy_(self._random(2, grid_rows))
        places = self.rng.permutation(grid_rows)
        inputs.document.fill_(int(places[-1]))
        unused = grid_rows - sum(map(len, plan.values()))
        row = 0
        taken: list[tuple[int, int]] = []
        for place, (document, lengths) in zip(places, plan.items(), strict=False):
            gap = int(self.rng.integers(unused + 1))
            row, unused = row + gap, unused - gap
            inputs.slots[place] = int(self.slots[document])
            inputs.fresh[place] = int(not self.begun[document])
            inputs.first_row[place], inputs.row_count[place] = row, len(lengths)
            self.begun[document] = True
            for length in lengths:
                start = self.done[document]
                inputs.tokens[row, :length] = self.documents[document][start : start + length]
                inputs.lengths[row], inputs.document[row] = length, int(place)
                self.done[document] += length
                taken.append((document, row))
                row += 1
        outputs, usage = self._run(inputs, [int(self.slots[document]) for document in plan])
        for document, row in taken:
            length = int(inputs.lengths[row])
            counted = usage[row] if self.count else None
            share = Share(length, outputs.evidence[row], float(length), counted)
            self.shares[document].append(share)
        for place, document in zip(places, plan, strict=False):
            self.logits[document] = outputs.logits[place]

    def _run(self, inputs: Inputs, slots: list[int]) -> tuple[Outputs, Tensor]:
        """Outputs and usage on the CPU, of a step that must leave all other slots as they are."""
        before = self.states.gather(torch.arange(len(self.states.weight), device=DEVICE))
        there = Inputs.empty((len(inputs.lengths), self.chunk), DEVICE)
        there.whole.copy_(inputs.whole)
        outputs = Outputs.empty(len(inputs.lengths), len(self.classifier.config.labels), DEVICE)
        outputs.whole.fill_(255)  # the bytes of NaN
        usage = torch.full((len(inputs.lengths), *self.states.mass.shape[1:]), torch.nan)
        usage = usage.to(DEVICE)
        self.step(there, self.states, outputs, usage if self.count else None)
        others = [slot for slot in range(len(self.states.weight)) if slot not in slots]
        for (_, x), (_, y) in zip(before.tensors(), self.states.tensors(), strict=True):
            torch.testing.assert_close(y[others], x[others], rtol=0, atol=0, equal_nan=True)
        outputs = replace(outputs, evidence=outputs.evidence.cpu(), logits=outputs.logits.cpu())
        return outputs, usage.cpu()

    def move(self) -> None:
        """Each document's state to another slot; what it leaves behind is NaN."""
        now = self.states.gather(torch.from_numpy(self.slots).to(DEVICE))
        for slot in self.slots:
            self._poison(slot)
        free = [slot for slot in range(len(self.states.weight)) if slot not in self.slots]
        self.slots = self.rng.permutation(free)[: len(self.slots)]
        self.states.scatter_(torch.from_numpy(self.slots).to(DEVICE), now)

    def result(self) -> Read:
        states = self.states.gather(torch.from_numpy(self.slots).to(DEVICE)).to("cpu")
        return Read(self.shares, states)

    def _poison(self, slot: int) -> None:
        for _, tensor in self.states.tensors():
            tensor[slot] = torch.nan

    @staticmethod
    def _at(slot: int) -> Tensor:
        return torch.tensor([slot], device=DEVICE)

    def _random(self, below: int, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.integers(0, below, shape))


def check(classifier: Classifier, chunk: int, precision: FusedPrecision = "bfloat16") -> None:
    """Four documents in three steps of two sizes; one goes on after some hundred tokens."""
    almost = max(1, chunk - 1)
    plans: list[tuple[int, dict[int, Rows]]] = [
        (5, {0: [chunk, almost], 1: [1], 2: [chunk]}),
        (5, {1: [chunk, chunk, 1], 0: [1]}),
        (2, {3: [almost], 0: [chunk]}),
    ]
    lengths = [sum(sum(plan.get(i, [])) for _, plan in plans) for i in range(4)]
    rng = np.random.default_rng(chunk)
    documents = documents_of(lengths, rng)
    before = used_state(classifier.config, len(documents), rng)
    for _, tensor in before.tensors():
        tensor[[0, 1, 3]] = 0.0
    # Counting is alike in both forms, and the interpreter is slow.
    count = classifier.config.form == "forgetting" or precision == "fp8"
    reader = Reader(
        classifier, documents, before, rows=5, chunk=chunk, precision=precision, count=count
    )
    for rows, plan in plans:
        reader.read(rows, plan)
        reader.move()
    read = reader.result()
    if precision == "fp8":
        assert_near(classifier, documents, before, read, 5e-2)
    else:
        assert_same(classifier, documents, before, read, 1e-2 if precision == "bfloat16" else 2e-5)
    own = classifier.logits(read.states.evidence, read.states.weight)
    assert error(reader.logits, own) <= 1e-12


@pytest.mark.parametrize(
    ("chunk", "conv_kernel", "layers", "form"),
    [
        (1, 2, 1, "paper"),
        pytest.param(3, 4, 2, "paper", marks=pytest.mark.long),
        pytest.param(5, 3, 1, "paper", marks=pytest.mark.long),
        pytest.param(64, 0, 1, "paper", marks=pytest.mark.long),
        pytest.param(70, 4, 1, "paper", marks=pytest.mark.long),
        (3, 4, 2, "forgetting"),
        (70, 4, 1, "forgetting"),
    ],
)
def test_any_chunking_beside_any_others_is_the_one_shot(
    chunk: int, conv_kernel: int, layers: int, form: str
) -> None:
    check(fitting(conv_kernel=conv_kernel, layers=layers, form=form), chunk)


@pytest.mark.long
@pytest.mark.parametrize("form", ["paper", pytest.param("forgetting", marks=pytest.mark.gpu)])
def test_long_segments(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Segments of several blocks, one or two a row: few rows of a small model are not cut so."""
    monkeypatch.setattr("gma.model.ops.triton.launch.ENOUGH", 8)
    check(fitting(form=form), 130)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "labels": tuple(map(str, range(40))),
            "prior_tokens": 2.5,
            "heads": 3,
            "routing_dim": 32,
            "value_dim": 64,
            "normalize_routing": False,
        },
        {**ANY, "labels": tuple(map(str, range(1200)))},
        {
            "labels": ("a", "b"),
            "prior_tokens": 0.0,
            "form": "forgetting",
            "heads": 3,
            "normalize_routing": False,
            "width": 264,
            "num_components": 32,
        },
        pytest.param({"form": "forgetting", "heads": 17}, marks=pytest.mark.long),
    ],
    ids=["many labels", "any, more labels than blocks", "wide", "many heads"],
)
def test_every_architecture(changes: dict[str, object]) -> None:
    check(fitting(**changes), 6)


def test_rates_that_are_small_add_up() -> None:
    """1e-5 a token and 1e-8: most of the one and all of the other is lost beside 1 in float32."""
    classifier = fitting(**ANY)
    quiet = torch.tensor([-11.0, -18.0, -60.0])
    classifier.pooling.deep.weight.zero_()
    classifier.pooling.token.weight.zero_()
    classifier.pooling.deep.bias.copy_(quiet)
    document = torch.zeros(9, dtype=torch.long)
    reader = Reader(classifier, [document], classifier.new_states(1), rows=2, chunk=6)
    reader.read(2, {0: [6, 3]})
    expected = 9 * quiet.double().exp().log1p() * classifier.pooling.factor
    found = reader.result().states.evidence[0].cpu()
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=0.0)
    logits = torch.log(torch.expm1(expected))
    torch.testing.assert_close(reader.logits[0].cpu(), logits, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("form", ["forgetting", pytest.param("paper", marks=pytest.mark.long)])
def test_fp8(form: str) -> None:
    check(fitting(form=form), 9, "fp8")


@pytest.mark.parametrize("form", ["forgetting", pytest.param("paper", marks=pytest.mark.long)])
def test_float32(form: str) -> None:
    check(fitting(form=form), 9, "float32")


def test_a_document_is_alone() -> None:
    """NaN in its state and in what its tokens mean, and where no token is, changes no other's."""
    chunk, lengths = 6, [15, 15, 8]
    classifier = fitting()
    rng = np.random.default_rng(0)
    documents = [document % 49 for document in documents_of(lengths, rng)]
    documents[1][7] = 49
    before = used_state(classifier.config, len(documents), rng)

    def run(nan: float) -> list[Tensor]:
        changed = copy.deepcopy(classifier)
        changed.embedding.weight[49] = nan
        before.memory[1, 0, 0, 3, 5] = before.tail[1, 0, 2, 7] = nan
        reader = Reader(changed, documents, before, rows=6, chunk=chunk)
        reader.read(6, {0: [6, 1], 1: [6, 3], 2: [3]})
        reader.read(6, {0: [6, 2], 1: [6], 2: [5]})
        read = reader.result()
        assert bool(read.shares[1][0].evidence.isfinite().all()) == (nan == 0.0)
        others = torch.tensor([0, 2])
        shares = [share.evidence for document in others for share in read.shares[document]]
        states = [tensor for _, tensor in read.states.gather(others).tensors()]
        return [*shares, *states, reader.logits[others]]

    for clean, beside in zip(run(0.0), run(torch.nan), strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, beside)


@pytest.mark.parametrize(
    ("form", "precision", "chunk"),
    [
        ("forgetting", "float32", 9),
        ("paper", "bfloat16", 9),
        *(
            pytest.param(form, precision, 70, marks=pytest.mark.long)
            for form in ("forgetting", "paper")
            for precision in PRECISIONS
        ),
    ],
)
def test_what_shares_a_step_changes_no_bit(
    form: str, precision: FusedPrecision, chunk: int
) -> None:
    """Whichever rows are read together, of one document or of several, in whichever grid."""
    rows = 24
    classifier = fitting(form=form, layers=2)
    # Scores of all sizes: numbers that are all alike may be rounded alike.
    classifier.pooling.token.weight.normal_(generator=torch.Generator().manual_seed(0))
    lengths = [12 * chunk, 1, 3 * chunk + 1, 2 * chunk - 1, chunk]
    documents = documents_of(lengths, np.random.default_rng(0))
    cut = [[min(chunk, n - at) for at in range(0, n, chunk)] for n in lengths]

    def reading(*steps: dict[int, Rows]) -> list[Tensor]:
        before = classifier.new_states(len(documents))
        reader = Reader(
            classifier, documents, before, rows=rows, chunk=chunk, precision=precision, count=True
        )
        for plan in steps:
            reader.read(sum(map(len, plan.values())), plan)
        found = reader.result()
        shares = [share for of_document in found.shares for share in of_document]
        usage = [share.usage for share in shares if share.usage is not None]
        states = [tensor for _, tensor in found.states.tensors()]
        return [*(share.evidence for share in shares), *usage, *states, reader.logits]

    together = reading(dict(enumerate(cut)))
    singles: list[dict[int, Rows]] = [{i: [n]} for i, each in enumerate(cut) for n in each]
    alone = reading(*singles)
    mixed = reading(
        {0: cut[0][:1], 2: cut[2][:3]},
        {0: cut[0][1:11], 1: [1], 3: cut[3][:1]},
        {0: cut[0][11:], 2: cut[2][3:], 3: cut[3][1:], 4: cut[4]},
    )
    for other in (alone, mixed):
        for mine, theirs in zip(other, together, strict=True):
            assert torch.equal(mine, theirs)


class TestRefuses:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_model_that_does_not_fit(self, precision: FusedPrecision) -> None:
        classifier = fitting(num_components=5)
        with pytest.raises(ValueError, match=f"^small has no fused step in {precision}: .*5"):
            FusedStep(classifier, rows=1, chunk=8, precision=precision)

    def test_rows_shorter_than_the_convolution_reaches(self) -> None:
        with pytest.raises(ValueError, match="rows of 2 tokens: at least 3"):
            FusedStep(fitting(), rows=1, chunk=2)

    @pytest.mark.parametrize("grid", [(3, 8), (2, 7)])
    def test_other_grids(self, grid: tuple[int, int]) -> None:
        classifier = fitting().to(DEVICE)
        step = FusedStep(classifier, rows=2, chunk=8)
        inputs, outputs = Inputs.empty(grid, DEVICE), Outputs.empty(grid[0], 3, DEVICE)
        with pytest.raises(ValueError, match="made for grids of up to 2 rows of 8"):
            step(inputs, classifier.new_states(1), outputs)

    def test_weights_that_it_cannot_hold(self) -> None:
        classifier = fitting()
        classifier.get_parameter("layers.0.mlp.up.weight").mul_(1e3)
        with pytest.raises(ValueError, match="small has no fused step in fp8: hidden activations"):
            FusedStep(classifier, rows=1, chunk=8, precision="fp8")
        FusedStep(classifier, rows=1, chunk=8, precision="bfloat16")
