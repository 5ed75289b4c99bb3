"""Runs steps of an exported model in ONNX Runtime, its states bound where they lie.

The model takes the states of D documents and gives those after the step. Documents meet nowhere in
it, so what is not finite in one spoils no other, and no step has to be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from onnxruntime import InferenceSession, IOBinding, RunOptions, SessionOptions

from gma.export.artifact import Artifact
from gma.service.cores import cores
from gma.service.engine.snapshot import Parts, Snapshot
from gma.service.engine.step import Batch, Ended, Launched, Outcome
from gma.service.observe.memory import Memory, driver_memory, gpu_memory, resident_memory
from gma.service.odds import log_odds
from gma.service.runners.grids import grids_up_to, warm_up
from gma.service.runners.onnx_pool import (
    AFTER,
    Arrays,
    Device,
    Documents,
    HostPool,
    ResidentPool,
    Values,
    parts_of,
    values_of,
)

PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

USAGE = "usage"
"""The output that a model has if it counts: of components, (R, L, H, K) float32."""

Provider = tuple[str, dict[str, str]]


class OnnxRunner:
    """An exported model on one device. Nothing of the session's choices is left to chance: another
    device, or other kernels, than those that were asked for fail the start."""

    backend = "onnx"
    depth = 1
    passes, pages = 1, 0

    def __init__(
        self,
        exported: Artifact,
        *,
        slots: int,
        rows: int,
        device: Device = "cpu",
        library: Path | None = None,
        threads: int = 0,
        memory: int = 8 * 1024**3,
        resident: bool | None = None,
    ) -> None:
        """`slots` documents at a time, up to `rows` of the model's chunks a step.

        `library` has kernels of the model's operators; without one, their definitions in the model
        run. `threads`: 0 takes every core. `memory`: bytes of a GPU for all but the states.
        `resident`: the model gets the states of all slots, which stay on the device; by default
        those on a GPU. On the CPU it costs less to copy those of a step.

        Raises ValueError if the device, the model or the library can't be used.
        """
        config = exported.config
        self.grids = grids_up_to(rows, exported.manifest.chunk, config)
        self.device = "cuda:0" if device == "cuda" else "cpu"
        self.dtype = exported.manifest.precision
        self._labels = len(config.labels)
        # On a CPU ONNX Runtime rounds a logarithm as it lies among the others of the step.
        self._takes_logarithms = device == "cpu" and config.pooling == "any"
        self.vocab_size = config.vocab_size
        self.versions: Mapping[str, str] = {"onnxruntime": onnxruntime.__version__}
        source = "function bodies" if library is None else "ai.gma library"
        self.kernels = f"ONNX Runtime {onnxruntime.__version__} {device.upper()}, {source}"
        # Only what runs on the GPU to the last part can be recorded, as the library's kernels do.
        self._records = device == "cuda" and library is not None
        if self._records:
            self.kernels += ", CUDA graphs"
        self._device_peak = 0
        provider = _provider(device, memory, records=self._records)
        self._session = _session(exported.model, device, library, threads, provider)
        self._runs: dict[tuple[int, ...], Run] = {}
        parts = parts_of(self._session)
        self.counts = any(output.name == USAGE for output in self._session.get_outputs())
        self._usage_shape = parts["mass"].shape  # (L, H, K)
        if resident is None:
            resident = device == "cuda"
        self.slots = slots
        self.pool: HostPool | ResidentPool = (
            ResidentPool(parts, slots, device) if resident else HostPool(parts, slots)
        )
        # All slots' states would be copied for that of one.
        self.parts: Parts | None = None if isinstance(self.pool, ResidentPool) else self.pool.parts
        if device == "cuda":
            gpu_memory()  # raises now, if it can't be read

    def warm_up(self) -> None:
        for grid in self.grids:
            for _ in range(2):  # for each of the states' two buffers
                warm_up(self, grid)

    def launch(self, batch: Batch) -> Launched:
        return Ended(self.step(batch))

    def step(self, batch: Batch) -> Outcome:
        """A step from its launch to its end. If it fails, all states are as they were."""
        documents = self.pool.documents(batch)
        run = self._run(batch, documents)
        for name, x in self._given(batch, documents).items():
            run.given[name].update_inplace(x)
        self._session.run_with_iobinding(run.binding, run.options)
        self.pool.keep(documents)
        evidence, logits = run.answers["row_evidence"].numpy(), run.answers["logits"].numpy()
        if self._takes_logarithms:
            logits = log_odds(documents.after["evidence"].numpy())
        weight = batch.lengths.astype(np.float32)
        usage = run.answers[USAGE].numpy().copy() if batch.count else None
        return Outcome(evidence.copy(), weight, logits[documents.place], usage)

    def snapshot(self, slot: int) -> Callable[[], Snapshot]:
        snapshot = self.pool.snapshot(slot)
        return lambda: snapshot

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        self.pool.restore(slot, snapshot)

    def _given(self, batch: Batch, documents: Documents) -> Arrays:
        return {
            "tokens": batch.tokens,
            "lengths": batch.lengths,
            "document_of_row": documents.of_row,
            "fresh": documents.fresh,
        }

    def _run(self, batch: Batch, documents: Documents) -> Run:
        """What a step of this grid and these states uses: a recorded one reads what it was recorded
        with."""
        rows, labels = len(batch.lengths), self._labels
        key = rows, *(id(x) for x in documents.states.values())
        if key not in self._runs:
            device = self.device.partition(":")[0]
            given = values_of(self._given(batch, documents), device)
            evidence = np.empty((rows, labels), np.float32)
            logits = np.empty((len(documents.fresh), labels), np.float64)
            answers = values_of({"row_evidence": evidence, "logits": logits}, device)
            if self.counts:
                usage = np.empty((rows, *self._usage_shape), np.float32)
                answers |= values_of({USAGE: usage}, device)
            binding, options = self._session.io_binding(), RunOptions()
            for name, value in {**given, **documents.states}.items():
                binding.bind_ortvalue_input(name, value)
            after = {name + AFTER: value for name, value in documents.after.items()}
            for name, value in {**answers, **after}.items():
                binding.bind_ortvalue_output(name, value)
            if self._records:
                options.add_run_config_entry("gpu_graph_id", str(len(self._runs) + 1))
            self._runs[key] = Run(given, answers, binding, options)
        return self._runs[key]

    @property
    def state_bytes(self) -> int:
        """See `Runner.state_bytes`."""
        return self.pool.state_bytes

    def memory(self) -> Memory:
        """The device's peak is the largest that this was ever called at."""
        if self.device == "cpu":
            return Memory(*resident_memory())
        device, total = driver_memory()
        self._device_peak = max(self._device_peak, device)
        return Memory(*resident_memory(), device, self._device_peak, 0, device, total)


def default_device() -> Device:
    """cuda where ONNX Runtime was built for it."""
    return "cuda" if PROVIDERS["cuda"] in onnxruntime.get_available_providers() else "cpu"


class Run(NamedTuple):
    """What a step of one grid reads and writes beside states, in memory that stays where it is."""

    given: Values
    answers: Values
    binding: IOBinding
    options: RunOptions


def _session(
    model: Path, device: Device, library: Path | None, threads: int, provider: Provider
) -> InferenceSession:
    """Raises ValueError unless the model runs on this device and with this library."""
    _check_provider(device)
    options = SessionOptions()
    options.log_severity_level = 3  # errors: what it warns of is where it places shapes
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    # Threads that spin while they wait take the cores from the gateway and from Ray.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        try:
            # A name alone would be looked for among the system's libraries.
            options.register_custom_ops_library(str(library.absolute()))
        except Exception as error:  # its own kinds, which have no base but this one
            raise ValueError(f"the operators' library {library}: {_line(error)}") from error
    try:
        session = InferenceSession(str(model), options, providers=[provider])
    except Exception as error:
        raise ValueError(f"ONNX Runtime can't load {model}: {_line(error)}") from error
    session.disable_fallback()
    # A provider that fails to load is left out without an error.
    used = session.get_providers()[0]
    if used != PROVIDERS[device]:
        raise ValueError(
            f"ONNX Runtime took {used} in place of {PROVIDERS[device]}: its own messages say why, "
            "most often a part of CUDA or cuDNN that is not found"
        )
    return session


def _check_provider(device: Device) -> None:
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise ValueError(
            f"this ONNX Runtime has no {PROVIDERS[device]}: install gma-service[onnx-gpu] in place "
            "of onnxruntime, or set GMA_DEVICE=cpu"
        )


def _provider(device: Device, memory: int, *, records: bool) -> Provider:
    if device == "cpu":
        return PROVIDERS[device], {}
    return PROVIDERS[device], {
        "device_id": "0",
        "gpu_mem_limit": str(memory),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",  # float32 is to be float32
        "enable_cuda_graph": str(int(records)),
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
