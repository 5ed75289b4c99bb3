"""The runner of bidirectional models: any mix, cut anyhow, gives the float64 model's answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from gma.model.classifier import Classifier
from gma.model.layers import Layer
from gma.service.engine.engine import Engine
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.step import Batch, Launched, Outcome
from gma.service.runners.compilations import Compilations
from gma.service.runners.passes import PassRunner
from tests.model.small import ANY, small
from tests.service.conformance import (
    assert_close,
    batch_of,
    check_all,
    poison,
    read_all,
    reference,
    tokens_of,
)

ROWS, CHUNK, SLOTS, PAGES = 5, 16, 6, 150
TOLERANCE = 1e-5  # relative, in float32


@pytest.fixture(scope="module", params=["paper", "forgetting"])
def classifier(request: pytest.FixtureRequest) -> Classifier:
    return small(causal=False, layers=3, form=request.param)


@pytest.fixture
def runner(classifier: Classifier) -> PassRunner:
    return runner_of(classifier)


@pytest.fixture(scope="module", params=["eager", pytest.param("inductor", marks=pytest.mark.long)])
def compiled(request: pytest.FixtureRequest) -> Iterator[PassRunner]:
    """One whose three rows are padded to four, traced and run by PyTorch or by what it generates,
    which takes a minute to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
        yield runner_of(small(causal=False, layers=3), rows=4, compile=True)


def runner_of(
    classifier: Classifier,
    *,
    pages: int = PAGES,
    rows: int = ROWS,
    compile: bool = False,
) -> PassRunner:
    memory = pages * CHUNK * classifier.config.width * classifier.embedding.weight.element_size()
    return PassRunner(
        classifier, slots=SLOTS, page_memory=memory, rows=rows, chunk=CHUNK, compile=compile
    )


def in_pass(
    runner: PassRunner, documents: Sequence[tuple[int, int, Sequence[int], Tokens]]
) -> Batch:
    """One step of documents: slot, pass, pages, and all tokens."""
    return in_passes(
        runner,
        [
            (slot, range(number, number + 1), pages, tokens)
            for slot, number, pages, tokens in documents
        ],
    )


def in_passes(
    runner: PassRunner, documents: Sequence[tuple[int, range, Sequence[int], Tokens]]
) -> Batch:
    """One step of documents: slot, passes, pages, and all tokens."""
    batch = batch_of(runner, [(slot, True, tokens) for slot, _, _, tokens in documents])
    row = 0
    for index, (_, passes, pages, _) in enumerate(documents):
        batch.first_pass[index], batch.last_pass[index] = passes[0], passes[-1]
        batch.page_of_row[row : row + len(pages)] = pages
        row += len(pages)
    return batch


SEEDS = [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_mix_and_any_cut_give_the_exact_answer(
    runner: PassRunner, classifier: Classifier, seed: int
) -> None:
    """Nothing of the past is left in a slot or a page: each holds NaN before."""
    runner.warm_up()
    poison(runner)
    check_all(runner, classifier, seed, tolerance=TOLERANCE)


def test_whatever_the_pooling() -> None:
    classifier = small(causal=False, **ANY)
    runner = runner_of(classifier)
    runner.warm_up()
    poison(runner)
    check_all(runner, classifier, 0, tolerance=TOLERANCE)


@pytest.mark.parametrize("rows", [1, 3])
def test_many_documents_that_fit_beside_few_others(classifier: Classifier, rows: int) -> None:
    runner = runner_of(classifier, pages=20, rows=rows)
    poison(runner)
    lengths = [20 * CHUNK, 1, 2, CHUNK + 1, 5 * CHUNK, 20 * CHUNK - 1, CHUNK, 7, 3 * CHUNK + 3]
    check_all(runner, classifier, 0, tolerance=TOLERANCE, lengths=lengths)


def test_documents_in_different_passes_of_one_step(
    runner: PassRunner, classifier: Classifier
) -> None:
    poison(runner)
    tokens = [tokens_of(runner, length) for length in (CHUNK + 3, CHUNK - 1, 2 * CHUNK)]
    places = [(4, [7, 3]), (0, [5]), (2, [0, 9])]
    outcomes: list[Outcome] = []
    for step in range(runner.passes + 2):
        documents = [
            (slot, step - late, pages, own)
            for late, ((slot, pages), own) in enumerate(zip(places, tokens, strict=True))
            if 0 <= step - late < runner.passes
        ]
        outcomes.append(runner.step(in_pass(runner, documents)))
        last = [number == runner.passes - 1 for _, number, _, _ in documents]
        assert (outcomes[-1].logits[: len(last)] != 0).any(1).tolist() == last
    for late, own in enumerate(tokens):
        # Those before it are done by then.
        assert_close(
            outcomes[runner.passes - 1 + late].logits[0], reference(classifier, own), TOLERANCE
        )


def test_a_short_document_in_all_passes_of_a_step_in_which_others_are_in_one(
    runner: PassRunner, classifier: Classifier
) -> None:
    poison(runner)
    short = [tokens_of(runner, CHUNK + 3), tokens_of(runner, 5)]
    others = tokens_of(runner, 2 * CHUNK)
    everything = range(runner.passes)
    for number in everything:
        outcome = runner.step(
            in_passes(
                runner,
                [
                    (4, everything, [7, 3], short[0]),
                    (0, range(number, number + 1), [5, 1], others),
                    (1, everything, [2], short[1]),
                ],
            )
        )
        for document, tokens in ((0, short[0]), (2, short[1])):
            assert_close(outcome.logits[document], reference(classifier, tokens), TOLERANCE)
    assert_close(outcome.logits[1], reference(classifier, others), TOLERANCE)


def test_a_document_goes_through_the_passes_that_it_has_left(
    runner: PassRunner, classifier: Classifier
) -> None:
    tokens = tokens_of(runner, 3 * CHUNK - 1)
    for cut in range(1, runner.passes):
        poison(runner)
        for passes in (range(cut), range(cut, runner.passes)):
            outcome = runner.step(in_passes(runner, [(1, passes, [3, 1, 2], tokens)]))
        assert_close(outcome.logits[0], reference(classifier, tokens), TOLERANCE)


@pytest.mark.anyio
async def test_a_short_document_beside_a_long_one_is_done_after_one_step(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(classifier, pages=PAGES)
    steps: list[Batch] = []
    launch = runner.launch

    def remembered(batch: Batch) -> Launched:
        steps.append(batch)
        return launch(batch)

    monkeypatch.setattr(runner, "launch", remembered)
    tokens = np.full(CHUNK + 1, 3, np.int32)
    engine = Engine(runner, max_waiting=9, inbox_tokens=1000, idle_timeout_s=60)
    await engine.start()
    try:
        long = engine.open(Opening("long", np.full(100 * CHUNK, 4, np.int32), True, False, True))
        await anext(aiter(long))
        short = engine.open(Opening("short", tokens, True, False, False))
        told = [progress async for progress in short]
        assert not long.closed
    finally:
        await engine.stop()
    with_short = [batch for batch in steps if (batch.tokens[:, 0] == 3).any()]
    assert [(batch.tokens[:, 0] == 3).sum() for batch in with_short] == [2]
    assert_close(told[-1].logits, reference(classifier, tokens), TOLERANCE)


def test_of_short_documents_in_one_step_one_that_is_no_number_spoils_no_other(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it read on: only its pass is read again, document by document."""
    broken = copy.deepcopy(classifier)
    broken.embedding.weight.data[7] = float("nan")
    runner = runner_of(broken)
    poison(runner)
    tokens = [tokens_of(runner, length) for length in (CHUNK + 3, CHUNK, 5)]
    for each in tokens:
        each[each == 7] = 8
    tokens[1][3] = 7
    numbers: list[int] = []
    layers_of = broken.layers_of

    def remembered(number: int) -> tuple[Layer | None, Layer | None]:
        numbers.append(number)
        return layers_of(number)

    monkeypatch.setattr(broken, "layers_of", remembered)
    everything = range(runner.passes)
    documents = [(0, everything, [0, 1], tokens[0]), (1, everything, [2], tokens[1])]
    outcome = runner.step(in_passes(runner, [*documents, (2, everything, [3], tokens[2])]))
    assert np.isfinite(outcome.logits[:3]).all(1).tolist() == [True, False, True]
    assert len(numbers) == runner.passes + 3
    for document in (0, 2):
        assert_close(outcome.logits[document], reference(classifier, tokens[document]), TOLERANCE)


def test_a_step_touches_the_slots_and_pages_of_its_documents_only(runner: PassRunner) -> None:
    poison(runner)
    runner.step(
        in_pass(
            runner,
            [(2, 0, [8, 1], tokens_of(runner, 20)), (4, 0, [0], tokens_of(runner, 3))],
        )
    )
    written = [
        bool(np.isfinite(runner.pool.snapshot(slot)()["mass"][0, 1]).all()) for slot in range(SLOTS)
    ]
    assert written == [False, False, True, False, True, False]
    finite = runner.hidden.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
    assert finite == [0, 1, 8]


def test_a_document_whose_numbers_overflow_spoils_no_other(
    runner: PassRunner, classifier: Classifier
) -> None:
    check_overflow(runner, classifier, (CHUNK + 3, 2 * CHUNK, 5), spoilt=1)


def check_overflow(
    runner: PassRunner, classifier: Classifier, lengths: Sequence[int], *, spoilt: int
) -> None:
    """Spoil a document's first page before each pass: all others' answers stay."""
    tokens = [tokens_of(runner, length) for length in lengths]
    ends = np.cumsum([-(-length // CHUNK) for length in lengths])
    pages = np.split(np.arange(ends[-1]), ends[:-1])
    others = [document for document in range(len(lengths)) if document != spoilt]
    for late in range(1, runner.passes):
        poison(runner)
        for number in range(runner.passes):
            if number == late:
                runner.hidden[pages[spoilt][0]] = float("nan")
            outcome = runner.step(
                in_pass(
                    runner,
                    [
                        (slot, number, each.tolist(), own)
                        for slot, (each, own) in enumerate(zip(pages, tokens, strict=True))
                    ],
                )
            )
            numbers = np.isfinite(outcome.logits[: len(lengths)]).all(1).tolist()
            assert numbers == [each in others or number < late for each in range(len(lengths))]
        assert outcome.finite[np.concatenate([pages[document] for document in others])].all()
        for document in others:
            expected = reference(classifier, tokens[document])
            assert_close(outcome.logits[document], expected, TOLERANCE)


@pytest.mark.long
def test_compiled_it_answers_as_exactly_and_compiles_no_more(compiled: PassRunner) -> None:
    """However many layers there are, a grid takes three compilations."""
    compilations = Compilations()
    compiled.warm_up()
    assert compilations.new() == 3 * len(compiled.grids)
    poison(compiled)
    check_all(compiled, small(causal=False, layers=3), 0, tolerance=TOLERANCE)
    assert compilations.new() == 0


def test_compiled_a_document_whose_numbers_overflow_spoils_no_other(compiled: PassRunner) -> None:
    compiled.warm_up()
    classifier = small(causal=False, layers=3)
    check_overflow(compiled, classifier, (CHUNK - 1, 5, CHUNK), spoilt=2)


def test_compiled_a_row_that_is_not_used_reads_and_writes_nothing(compiled: PassRunner) -> None:
    """Nor does its page, which is the first and holds NaN, and its state, which does too."""
    compiled.warm_up()
    poison(compiled)
    tokens = tokens_of(compiled, 3 * CHUNK - 1)
    for number in range(compiled.passes):
        outcome = compiled.step(in_pass(compiled, [(1, number, [3, 1, 2], tokens)]))
        assert outcome.finite.all()
    expected = reference(small(causal=False, layers=3), tokens)
    assert_close(outcome.logits[0], expected, TOLERANCE)
    finite = compiled.hidden.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
    assert finite == [1, 2, 3]


def test_its_memory_is_a_page_a_chunk_and_its_states_do_not_grow_with_layers() -> None:
    shallow, deep = (runner_of(small(causal=False, layers=layers), pages=50) for layers in (1, 5))
    assert (shallow.pages, deep.pages) == (50, 50)
    assert shallow.hidden.nbytes == deep.hidden.nbytes
    assert shallow.state_bytes == deep.state_bytes


def test_memory_for_less_than_a_page_is_refused(classifier: Classifier) -> None:
    with pytest.raises(ValueError, match="GMA_PAGE_MEMORY is 100 bytes"):
        PassRunner(classifier, slots=1, page_memory=100, rows=1, chunk=CHUNK)


@pytest.mark.parametrize("where", ["embedding.weight", "layers.2.mlp.up.weight"])
def test_weights_that_are_no_numbers_fail_the_warm_up(classifier: Classifier, where: str) -> None:
    broken = copy.deepcopy(classifier)
    broken.get_parameter(where)[3, 3] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        runner_of(broken).warm_up()


def test_a_document_of_many_pages_in_one_piece(runner: PassRunner, classifier: Classifier) -> None:
    tokens = tokens_of(runner, PAGES * CHUNK - 16 * CHUNK)
    (progress,) = read_all(runner, [tokens])
    assert_close(progress.logits, reference(classifier, tokens), TOLERANCE)


def test_what_a_pass_says_that_is_not_the_last(runner: PassRunner) -> None:
    outcome = runner.step(in_pass(runner, [(0, 0, [0], tokens_of(runner, 5))]))
    blank = Outcome.blank(len(outcome.weight), 3)
    assert np.array_equal(outcome.evidence, blank.evidence)
    assert np.array_equal(outcome.logits, blank.logits)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(classifier: Classifier, compile: bool) -> None:
    runner = runner_of(copy.deepcopy(classifier).cuda(), compile=compile)
    runner.warm_up()
    poison(runner)
    check_all(runner, classifier, seed=0, tolerance=TOLERANCE)
    check_overflow(runner, classifier, (CHUNK - 1, 5, CHUNK), spoilt=0)
    assert runner.memory().device >= runner.hidden.nbytes
