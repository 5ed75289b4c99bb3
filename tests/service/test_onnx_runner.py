"""ONNX Runtime's runner: any mix of documents, cut anyhow, gives the float64 model's answer."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnxruntime

from gma.export.artifact import Artifact, export
from gma.model import weights
from gma.model.classifier import Classifier
from gma.service.engine.step import Batch
from gma.service.runners.onnx import OnnxRunner
from gma.service.runners.torch import TorchRunner
from tests.model.small import ANY
from tests.service.asgi import save_checkpoint
from tests.service.conformance import (
    assert_close,
    batch_of,
    check_all,
    check_bits,
    poison,
    read_all,
    reference,
    tokens_of,
)

ROWS, CHUNK, SLOTS = 4, 16, 6
TOLERANCE = 1e-5  # relative, in float32
NO_TOKEN = 10**6  # no model has it: its step fails

without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this ONNX Runtime has CUDA",
)


@pytest.fixture(scope="module")
def classifier(checkpoint: Path) -> Classifier:
    return weights.load(checkpoint).classifier


@pytest.fixture(scope="module")
def artifact(exported: Path) -> Artifact:
    return Artifact.open(exported)


def test_onnx_runtime_tells_nobody(tmp_path: Path) -> None:
    """With telemetry, it leaves a file of its session where temporary files are."""
    telling = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
    environment = {name: x for name, x in os.environ.items() if name not in telling}
    subprocess.run(
        [sys.executable, "-c", "import gma.service.runners.onnx"],
        env=environment | {"TMPDIR": str(tmp_path)},
        check=True,
    )
    assert list(tmp_path.iterdir()) == []


def make(artifact: Artifact, **options: Any) -> OnnxRunner:
    return OnnxRunner(artifact, **{"slots": SLOTS, "rows": ROWS, "threads": 1, **options})


@pytest.fixture(params=["function bodies", "ai.gma library"])
def kernels(request: pytest.FixtureRequest) -> Path | None:
    """What computes the operators: their bodies in the model, or a library."""
    if request.param == "function bodies":
        return None
    library: Path = request.getfixturevalue("library")
    return library


@pytest.fixture(params=[False, True], ids=["a step's states", "all states"])
def runner(request: pytest.FixtureRequest, artifact: Artifact, kernels: Path | None) -> OnnxRunner:
    return make(artifact, library=kernels, resident=request.param)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_any_mix_and_any_cut_give_the_exact_answer(
    runner: OnnxRunner, classifier: Classifier, seed: int
) -> None:
    """Every slot, the unused rows' too, holds NaN before."""
    poison(runner)
    check_all(runner, classifier, seed, tolerance=TOLERANCE)


@pytest.mark.parametrize("length", [1, 1000])
def test_a_lone_document_in_one_piece(
    runner: OnnxRunner, classifier: Classifier, length: int
) -> None:
    (progress,) = read_all(runner, [tokens_of(runner, length)])
    assert_close(progress.logits, reference(classifier, tokens_of(runner, length)), TOLERANCE)


def test_a_step_touches_the_slots_of_its_documents_only(runner: OnnxRunner) -> None:
    poison(runner)
    runner.step(
        batch_of(runner, [(2, True, tokens_of(runner, 20)), (4, True, tokens_of(runner, 3))])
    )
    finite = [
        all(np.isfinite(x).all() for x in runner.pool.snapshot(slot).values())
        for slot in range(SLOTS)
    ]
    assert finite == [False, False, True, False, True, False]


@pytest.mark.parametrize("part", ["memory", "mass", "tail", "evidence", "weight"])
def test_a_document_whose_numbers_overflow_spoils_no_other(runner: OnnxRunner, part: str) -> None:
    """The other's answer is not near what it would be: it is the same."""
    pieces = [tokens_of(runner, length) for length in (2 * CHUNK, CHUNK + 3)]
    runner.step(batch_of(runner, [(i, True, piece) for i, piece in enumerate(pieces)]))
    states = [runner.pool.snapshot(slot) for slot in range(2)]

    def read_on() -> tuple[Any, ...]:
        poison(runner)
        for slot, state in enumerate(states):
            runner.pool.restore(slot, state)
        batch = batch_of(runner, [(i, False, piece) for i, piece in enumerate(pieces)])
        outcome = runner.step(batch)
        state = runner.pool.snapshot(1)
        finite = bool(outcome.finite[:2].all() and np.isfinite(outcome.logits[0]).all())
        return finite, [outcome.evidence[2:], outcome.logits[1], *state.values()]

    finite, clean = read_on()
    states[0][part].fill(np.nan)
    finite_beside, beside = read_on()
    assert (finite, finite_beside) == (True, False)
    for expected, found in zip(clean, beside, strict=True):
        assert np.array_equal(expected, found)


def test_a_step_that_fails_leaves_all_states_as_they_were(
    runner: OnnxRunner, classifier: Classifier
) -> None:
    tokens = tokens_of(runner, CHUNK + 7)
    begun = [(0, True, tokens[:CHUNK]), (1, True, tokens_of(runner, 9))]
    runner.step(batch_of(runner, begun))
    before = [runner.pool.snapshot(slot) for slot in range(SLOTS)]
    impossible = np.full(3, NO_TOKEN, np.int32)
    with pytest.raises(Exception, match="Gather"):
        runner.launch(
            batch_of(runner, [(0, False, tokens[CHUNK:]), (1, False, impossible)])
        ).outcome()
    for slot, state in enumerate(before):
        for name, x in runner.pool.snapshot(slot).items():
            assert np.array_equal(x, state[name], equal_nan=True)
    outcome = runner.step(batch_of(runner, [(0, False, tokens[CHUNK:])]))
    assert_close(outcome.logits[0], reference(classifier, tokens), TOLERANCE)


def test_outcomes_stay_as_they_are(runner: OnnxRunner) -> None:
    """The batch may be filled anew, and steps run over the same grid."""
    batch = batch_of(runner, [(1, True, tokens_of(runner, 5))])
    outcome = runner.step(batch)
    kept = outcome.evidence.copy(), outcome.logits.copy()
    for seed in range(1, 4):
        batch.tokens[0] = tokens_of(runner, CHUNK, seed)
        batch.lengths[0] = CHUNK
        assert not np.array_equal(runner.step(batch).evidence, kept[0])
    assert np.array_equal(outcome.evidence, kept[0])
    assert np.array_equal(outcome.logits, kept[1])
    assert outcome.weight.tolist() == [5]


def test_a_step_leaves_earlier_batches_as_they_were(runner: OnnxRunner) -> None:
    first, then = (batch_of(runner, [(1, True, tokens_of(runner, n, n))]) for n in (5, CHUNK))
    kept = deepcopy(first)
    for batch in (first, then, then):
        runner.step(batch)
    for field in fields(Batch):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(kept, field.name))


@pytest.mark.parametrize("resident", [False, True])
def test_a_document_goes_on_in_another_runner(
    artifact: Artifact, classifier: Classifier, resident: bool
) -> None:
    """In another slot, and after PyTorch: a snapshot says nothing of what it came from."""
    here = TorchRunner(classifier, slots=2, rows=ROWS, chunk=CHUNK)
    there = make(artifact, slots=9, rows=3, resident=resident)
    back = make(artifact, slots=1, resident=not resident)
    tokens = tokens_of(there, 3 * CHUNK + 5)
    here.step(batch_of(here, [(1, True, tokens[:CHUNK])]))
    there.pool.restore(7, here.snapshot(1)())
    there.step(batch_of(there, [(7, False, tokens[CHUNK : 2 * CHUNK])]))
    back.pool.restore(0, there.pool.snapshot(7))
    outcome = back.step(batch_of(back, [(0, False, tokens[2 * CHUNK :])]))
    assert_close(outcome.logits[0], reference(classifier, tokens), TOLERANCE)
    for pool in (there.pool, back.pool):
        with pytest.raises(ValueError, match=f"slot {pool.count} is not one of"):
            pool.snapshot(pool.count)


@pytest.mark.parametrize(("rows", "grids"), [(1, [1]), (6, [1, 2, 4, 6])])
def test_grids_double_up_to_the_full_one(artifact: Artifact, rows: int, grids: list[int]) -> None:
    runner = make(artifact, slots=1, rows=rows)
    assert [tuple(grid) for grid in runner.grids] == [(rows, CHUNK) for rows in grids]


@pytest.mark.parametrize(
    "changes",
    [{"conv_kernel": 0}, {"form": "forgetting"}, {**ANY, "layers": 1}],
    ids=["no convolution", "forgetting", "pooling any"],
)
def test_other_models(changes: dict[str, Any], library: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", **changes)
    artifact = export(folder, tmp_path / "exported", chunk=CHUNK)
    for resident, kernels in ((False, None), (True, None), (False, library)):
        runner = make(artifact, resident=resident, library=kernels)
        poison(runner)
        check_all(runner, weights.load(folder).classifier, seed=0, tolerance=TOLERANCE)


@pytest.mark.parametrize("changes", [{"form": "forgetting"}, ANY], ids=["forgetting", "any"])
def test_what_shares_a_step_changes_no_bit(
    changes: dict[str, Any], library: Path, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", **changes)
    exported = export(folder, tmp_path / "exported", chunk=37)
    for threads in (1, 3):
        check_bits(make(exported, library=library, threads=threads))


def test_what_it_tells_of_itself(
    runner: OnnxRunner, artifact: Artifact, kernels: Path | None
) -> None:
    runs = "function bodies" if kernels is None else "ai.gma library"
    assert runner.kernels == f"ONNX Runtime {onnxruntime.__version__} CPU, {runs}"
    assert (runner.backend, runner.device, runner.dtype) == ("onnx", "cpu", "float32")
    assert runner.vocab_size == artifact.config.vocab_size
    assert not runner.counts  # nor does any model that was exported in the paper's form
    assert (runner.depth, runner.pool.count) == (1, SLOTS)
    memory = runner.memory()
    assert 0 < memory.resident <= memory.resident_peak
    assert (memory.device, memory.device_peak) == (0, 0)


class TestWhatStopsTheStart:
    @without_cuda
    def test_a_provider_that_is_not_there(self, artifact: Artifact) -> None:
        with pytest.raises(ValueError, match=r"no CUDAExecutionProvider: install .*\[onnx-gpu\]"):
            make(artifact, device="cuda")

    @without_cuda
    @pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
    def test_a_provider_that_does_not_load(
        self, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """ONNX Runtime then takes another, and says so on stderr at most."""
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
        with pytest.raises(ValueError, match="took CPUExecutionProvider in place of CUDA"):
            make(artifact, device="cuda")

    def test_a_library_that_does_not_load(self, artifact: Artifact, tmp_path: Path) -> None:
        library = tmp_path / "libother.so"
        library.write_bytes(b"nothing that runs")
        with pytest.raises(ValueError, match=r"the operators' library .*libother\.so: ") as raised:
            make(artifact, library=library)
        assert "\n" not in str(raised.value)

    def test_a_model_that_does_not_load(self, artifact: Artifact, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"nothing that runs")
        broken = replace(artifact, folder=tmp_path)
        with pytest.raises(ValueError, match=r"can't load .*model\.onnx: "):
            make(broken)

    def test_a_grid_that_cannot_work(self, artifact: Artifact) -> None:
        with pytest.raises(ValueError, match="a grid of 0 x 16"):
            make(artifact, rows=0)
