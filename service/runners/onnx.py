"""Runs steps of an exported model in ONNX Runtime, its states bound where they lie.

The model takes the states of D documents and gives those after the step. Documents meet nowhere in
it, so what is not finite in one spoils no other, and no step has to be run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime import InferenceSession, IOBinding, OrtValue, RunOptions, SessionOptions

from gma.export.artifact import Artifact
from gma.service.cores import cores
from gma.service.engine.slots import Slots
from gma.service.engine.step import Batch, Ended, Launched, Outcome
from gma.service.observe.memory import Memory, driver_memory, gpu_memory, resident_memory
from gma.service.runners.grids import grids_up_to, warm_up

StateType: TypeAlias = type[np.float32] | type[np.float64]

Device = Literal["cpu", "cuda"]

PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

AFTER = "_after"
"""An output of this ending is the state of the input without it."""

DTYPES: dict[str, StateType] = {"tensor(float)": np.float32, "tensor(double)": np.float64}

Arrays = Mapping[str, NDArray[Any]]
Values = Mapping[str, OrtValue]
Provider = tuple[str, dict[str, str]]


class OnnxRunner:
    """An exported model on one device. Nothing of the session's choices is left to chance: another
    device, or other kernels, than those that were asked for fail the start."""

    backend = "onnx"
    depth = 1

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
        self.labels = config.labels
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
        parts = _parts(self._session)
        if resident is None:
            resident = device == "cuda"
        self.pool: HostPool | ResidentPool = (
            ResidentPool(parts, slots, device) if resident else HostPool(parts, slots)
        )
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
        evidence, logits = (run.answers[name].numpy() for name in ("row_evidence", "logits"))
        weight = batch.lengths.astype(np.float32)
        return Outcome(evidence.copy(), weight, logits[documents.place])

    def _given(self, batch: Batch, documents: Documents) -> Arrays:
        return {
            "tokens": batch.tokens,
            "lengths": batch.lengths,
            "document_of_row": documents.of_row,
            "fresh": documents.fresh,
        }

    def _run(self, batch: Batch, documents: Documents) -> Run:
        """That of this grid and these states: a recorded step reads what it was recorded with."""
        rows, labels = len(batch.lengths), len(self.labels)
        key = rows, *(id(x) for x in documents.states.values())
        if key not in self._runs:
            device = self.device.partition(":")[0]
            given = _values(self._given(batch, documents), device)
            evidence = np.empty((rows, labels), np.float32)
            logits = np.empty((len(documents.fresh), labels), np.float64)
            answers = _values({"row_evidence": evidence, "logits": logits}, device)
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


@dataclass(frozen=True)
class Documents:
    """A step's documents as the model sees them: D of them, whether or not they have rows."""

    slots: NDArray[np.int64]  # (R,) of the batch's documents
    place: NDArray[np.int64]  # (R,) where those are among the D
    of_row: NDArray[np.int64]  # (R,) which of the D each row belongs to
    fresh: NDArray[np.bool_]  # (D,)
    states: Values  # (D, ...) each
    after: Values  # the same, where those after the step are to go


class Run(NamedTuple):
    """What a step of one grid reads and writes beside states, in memory that stays where it is."""

    given: Values
    answers: Values
    binding: IOBinding
    options: RunOptions


class Part(NamedTuple):
    """One part of a document's state."""

    shape: tuple[int, ...]
    dtype: StateType

    def zeros(self, documents: int) -> NDArray[Any]:
        return np.zeros((documents, *self.shape), self.dtype)


class HostPool(Slots):
    """Slots and their states on the host. A step gets copies of its documents' alone."""

    def __init__(self, parts: Mapping[str, Part], slots: int) -> None:
        super().__init__(slots)
        self._parts = parts
        self.states = {name: part.zeros(slots + 1) for name, part in parts.items()}
        # Of so many documents: where states are copied to, the same memory again, and those after.
        self._copies: dict[int, tuple[Arrays, Values, Values]] = {}

    @property
    def state_bytes(self) -> int:
        return sum(x.nbytes for x in self.states.values())

    def documents(self, batch: Batch) -> Documents:
        """Those of a batch."""
        slots = batch.slot_of_document
        count = len(slots)
        if count not in self._copies:
            zeros = {name: part.zeros(count) for name, part in self._parts.items()}
            shared = {name: OrtValue.ortvalue_from_numpy(x) for name, x in zeros.items()}
            self._copies[count] = zeros, shared, _values(zeros, "cpu")
        copies, states, after = self._copies[count]
        for name, x in self.states.items():
            np.take(x, slots, axis=0, out=copies[name], mode="clip")  # "raise" copies twice
        return Documents(
            slots=slots,
            place=np.arange(count),
            of_row=batch.document_of_row,
            fresh=batch.fresh,
            states=states,
            after=after,
        )

    def keep(self, documents: Documents) -> None:
        """Let the states after a step be those of its documents."""
        for name, states in self.states.items():
            states[documents.slots] = documents.after[name].numpy()

    def snapshot(self, slot: int) -> dict[str, NDArray[Any]]:
        """A copy of one document's state, (1, ...) each."""
        at = _checked(slot, self)
        return {name: x[at : at + 1].copy() for name, x in self.states.items()}

    def restore(self, slot: int, state: Arrays) -> None:
        """Put a snapshot, of any pool with the same model, into a taken slot."""
        at = _checked(slot, self)
        for name, x in self.states.items():
            x[at] = state[name][0]

    def fill(self, value: float) -> None:
        """Let every slot hold this, the scratch slot too."""
        for x in self.states.values():
            x.fill(value)


class ResidentPool(Slots):
    """Slots and their states on the device, twice: a step reads all of one buffer and writes all of
    the other, so that no state crosses to the host and none is lost if the step fails."""

    def __init__(self, parts: Mapping[str, Part], slots: int, device: Device) -> None:
        super().__init__(slots)
        self.states, self._after = (
            {
                name: OrtValue.ortvalue_from_numpy(part.zeros(slots + 1), device)
                for name, part in parts.items()
            }
            for _ in range(2)
        )
        self._bytes = 2 * sum(part.zeros(slots + 1).nbytes for part in parts.values())

    @property
    def state_bytes(self) -> int:
        return self._bytes

    def documents(self, batch: Batch) -> Documents:
        """Those of all slots."""
        slots = batch.slot_of_document
        fresh = np.zeros(self.count + 1, np.bool_)
        fresh[slots] = batch.fresh
        return Documents(
            slots=slots,
            place=slots,
            of_row=slots[batch.document_of_row],
            fresh=fresh,
            states=self.states,
            after=self._after,
        )

    def keep(self, documents: Documents) -> None:
        """Let the states after a step be those of its documents."""
        self.states, self._after = self._after, self.states

    def snapshot(self, slot: int) -> dict[str, NDArray[Any]]:
        """A copy of one document's state, (1, ...) each; all are copied on the way."""
        at = _checked(slot, self)
        return {name: x.numpy()[at : at + 1].copy() for name, x in self.states.items()}

    def restore(self, slot: int, state: Arrays) -> None:
        """Put a snapshot, of any pool with the same model, into a taken slot; all are copied."""
        at = _checked(slot, self)
        for name, value in self.states.items():
            states = value.numpy().copy()
            states[at] = state[name][0]
            value.update_inplace(states)

    def fill(self, value: float) -> None:
        """Let every slot hold this, the scratch slot too, in both buffers."""
        for x in (*self.states.values(), *self._after.values()):
            x.update_inplace(np.full_like(x.numpy(), value))


def _checked(slot: int, pool: Slots) -> int:
    if not 0 <= slot < pool.count:
        raise ValueError(f"slot {slot} is not one of {pool.count}")
    return slot


def _values(arrays: Arrays, device: str) -> dict[str, OrtValue]:
    """Copies of them on the device."""
    return {name: OrtValue.ortvalue_from_numpy(x.copy(), device) for name, x in arrays.items()}


def _parts(session: InferenceSession) -> dict[str, Part]:
    """The parts of a state: inputs that come out again."""
    outputs = {output.name for output in session.get_outputs()}
    return {
        given.name: Part(tuple(given.shape[1:]), DTYPES[given.type])
        for given in session.get_inputs()
        if given.name + AFTER in outputs
    }


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
