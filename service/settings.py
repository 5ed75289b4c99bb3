"""Every setting of the service: `GMA_*` environment variables, read once, when it is started."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gma.model.config import DEFAULT_CHECKPOINT, MODEL_NAME, named, problems

PREFIX = "GMA_"

MIB, GIB = 1024**2, 1024**3

CPU_GRID, GPU_GRID = (8, 256), (64, 512)
"""Rows and tokens a row of the full step, unless settings say otherwise: what keeps a device busy,
and no longer than that, for a short document waits for up to two of them."""


def _listed(given: object) -> object:
    """What is separated by commas."""
    return _parts(given) if isinstance(given, str) else given


def _parts(given: str) -> list[str]:
    return [each.strip() for each in given.split(",") if each.strip()]


def _size(given: object) -> object:
    """A number of bytes, with a unit or without; pydantic passes over what follows it."""
    if isinstance(given, str) and not SIZE.fullmatch(given.strip()):
        raise ValueError("a number of bytes, or with a unit, as 64MiB")
    return given


SIZE = re.compile(r"\d+(\.\d+)?\s*([kmgtp]i?)?b?", re.IGNORECASE)


def _no_url(given: Path) -> Path:
    """Raises ValueError for what was meant to be another kind of place."""
    if ":/" in str(given):
        raise ValueError("of URLs only redis:// and rediss:// are known; a directory has none")
    return given


LONGEST_NAME = 64
NAMES = f"one has letters, digits, dots, dashes and underscores, {LONGEST_NAME} at most"


def is_model_name(name: str) -> bool:
    """Whether clients can ask for a model by it."""
    return bool(re.fullmatch(MODEL_NAME, name)) and len(name) <= LONGEST_NAME


def _models(given: object) -> object:
    """What `name=path,name=path` says, or the path of a file."""
    if not isinstance(given, str) or (given.strip() and "=" not in given):
        return given
    found: dict[str, str] = {}
    for each in _parts(given):
        name, _, path = (part.strip() for part in each.partition("="))
        if not path:
            raise ValueError(f"name=path is expected, and not {each!r}")
        if name in found:
            raise ValueError(f"{name} is there twice")
        if not is_model_name(name):
            raise ValueError(f"{name!r} is no name: {NAMES}")
        found[name] = path
    return found


HOST = r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?"
Origin = Annotated[str, Field(pattern=rf"^(\*|[a-z][a-z0-9+.-]*://{HOST})$")]
"""As browsers write one: in small letters, and no more than this."""
Origins = Annotated[tuple[Origin, ...], BeforeValidator(_listed)]
Folder = Annotated[Path, AfterValidator(_no_url)]
Redis = Annotated[str, Field(pattern=r"^rediss?://")]
Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[ByteSize, BeforeValidator(_size), Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Checkpoint = Annotated[Path, AfterValidator(named)]
ModelFolders = dict[str, Checkpoint]
Quantity = Annotated[ByteSize, BeforeValidator(_size), Field(ge=0)]


class SettingsError(ValueError):
    """The environment can't be used; the message names each variable that is wrong."""


class Settings(BaseSettings):
    """What the service runs with. Field `x` is read from the variable `GMA_X`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    checkpoint: Checkpoint = DEFAULT_CHECKPOINT
    """Folder of the model: a checkpoint, or what `gma export` made of one; contracts and books come
    with gma and need no path."""

    models: Annotated[ModelFolders | Path | None, BeforeValidator(_models), NoDecode] = None
    """Several models, in place of GMA_CHECKPOINT: NAME=FOLDER,NAME=FOLDER, or a TOML file with a
    table for each, which is watched while the service runs."""

    backend: Literal["auto", "torch", "onnx"] = "auto"
    """What runs the model: torch for a checkpoint, onnx (ONNX Runtime) for an exported model; auto
    looks which it is."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; `::` is every one, of IPv4 too. The default can be reached from this
    machine only."""

    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """TCP port to listen on."""

    path_prefix: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)*$")] = ""
    """What paths may have in front, as /classify, where a proxy sends on those below it as they
    are. Paths without it are answered too."""

    cors_origins: Annotated[Origins, NoDecode] = ()
    """Origins whose pages may use the service from a browser, separated by commas, as
    https://app.example; * is all. None by default."""

    api_keys_file: Path | None = None
    """File of the API keys that pass, as hashes that `gma key` prints; without it, no key is asked
    for. Read again within a second or so of a change; one that can't be used changes nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes GPUs if there are any."""

    workers: Count = 1
    """Worker processes of a model, each with the whole of it; on cuda each has a GPU of its own,
    or GMA_GPU_SHARE of one."""

    gpu_share: Annotated[float, Field(ge=0.01, le=1)] = 1
    """Share of a GPU that each worker counts for: workers of several models with .5 go two to a
    GPU. Nothing else divides it: its memory has to be enough for all."""

    gateways: Annotated[int, Field(ge=0)] = 0
    """Processes that speak HTTP and tokenize; 0 takes one for every two cores, at least two,
    so that one that is lost leaves another, and at most eight."""

    cores: Annotated[int, Field(ge=0)] = 0
    """Cores that the service counts on, on each machine or in each pod; 0 takes those that affinity
    and control groups' quotas leave. For containers that ask for CPUs without a limit, which would
    else have as many threads as the machine has cores."""

    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads that a worker computes with; 0 takes one a core."""

    dtype: Literal["auto", "float32", "float16", "bfloat16", "fp8", "int8"] = "auto"
    """What matrices are multiplied in. An exported model has its own, and auto takes it. In torch
    on a GPU, auto is bfloat16 with the fused kernels if they fit the model, else float32; fp8 is
    theirs too. On a CPU auto is float32; a causal model may be read in bfloat16 on a processor with
    AVX512-BF16, in int8 on one with AVX512-VNNI, and the start fails on others. States and sums
    are at least float32 in any case."""

    ops_library: Path | Literal["auto", "none"] = "auto"
    """Library of the model's operators for onnx: a file, or none for their slower definitions in
    the model itself; auto takes that of the package gma-ops if it is installed."""

    onnx_memory: Bytes = ByteSize(8 * GIB)
    """GPU memory that onnx may take for weights and activations; states come on top. Takes units.
    The start fails if a full step needs more."""

    compile_cache: Path | None = None
    """Folder of compiled GPU kernels: kept between starts, and made by `gma compile`."""

    rows: Annotated[int, Field(ge=0)] = 0
    """Chunks that one step reads; 0 takes 8 on the CPU, 64 on a GPU."""

    chunk_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of one chunk; 0 takes 256 on the CPU, 512 on a GPU, or an exported model's own."""

    slots: Count = 128
    """Documents that a worker reads at the same time. With more of them than a step has rows, a
    short one need not wait for the end of a long one."""

    page_memory: Bytes = ByteSize(4 * GIB)
    """Memory of a worker's pages, in which a bidirectional model keeps whole documents while it
    reads them: a token takes four bytes for each of the model's width. A document of more than
    seven eighths is answered with 413; those that find no room wait. Takes units."""

    max_waiting_documents: Annotated[int, Field(ge=0)] = 256
    """Documents that may wait for a slot of a worker; more are answered with 429. One of a
    bidirectional model waits from its first byte on: it gets no slot before its last."""

    inbox_tokens: Count = 65536
    """Tokens of one document that a worker holds unread before it lets the gateway wait. Whole
    documents, of a bidirectional model, are held as they come."""

    max_document_bytes: Bytes = ByteSize(64 * MIB)
    """Largest request body; larger ones are answered with 413. Takes units: 64MiB."""

    max_bytes_in_flight: Bytes = ByteSize(256 * MIB)
    """Request bodies that a gateway takes at the same time; beyond that it is 429. Takes units.
    Whatever is sent, its process takes no more than twice this and 350 MB."""

    max_documents_in_flight: Count = 256
    """Documents that a gateway takes at the same time; beyond that the answer is 429."""

    max_evidence_spans: Annotated[int, Field(ge=2)] = 1024
    """Spans in an answer's evidence; neighbours are merged until there are no more than that."""

    progress_interval_s: Seconds = 0.1
    """Least time between two progress events of one document."""

    max_share_per_key: Share = 0.75
    """Share of a gateway's documents and bytes in flight that one API key may hold; beyond that it
    is 429. A document that is alone is always taken."""

    max_share_per_address: Share = 1.0
    """The same for one IP address, or /64 of IPv6. All by default: behind a load balancer every
    client has one address."""

    key_documents_per_minute: Rate = 0
    """Documents that one API key may send in a minute, to all gateways together; beyond that it is
    429. 0 is no limit. The keys file may say otherwise of a key."""

    key_bytes_per_day: Quantity = ByteSize(0)
    """Bytes of documents that one API key may send in a day, likewise. A document that has begun is
    read to its end, and the next has to wait. Takes units."""

    sessions: Redis | Folder | None = None
    """Where documents that stay open are kept: a directory, which several machines have to share,
    or redis://HOST:PORT/DATABASE. Without it there are no sessions: they are what is left of
    clients' texts on a disk, and nobody should have that unasked."""

    session_ttl_s: Seconds = 86400
    """How long a session is kept after its last append."""

    idle_timeout_s: Seconds = 60
    """A document whose client sends less than the least rate for so long, or nothing, is dropped
    and answered with 408."""

    min_upload_rate: Quantity = ByteSize(1024)
    """Least bytes a second of a request body, over GMA_IDLE_TIMEOUT_S. Takes units."""

    max_slow_uploads: Count = 16
    """Bodies that a gateway lets come slower than the least rate for two seconds or more; of more,
    that which has sent least is answered with 408, as it is when all places are taken and a new
    document comes."""

    worker_timeout_s: Seconds = 10
    """How long a gateway waits for a worker to take a document before it answers 503."""

    shutdown_timeout_s: Seconds = 600
    """How long a stopping service waits for its documents; longer than the longest takes."""

    metrics_dir: Path | None = None
    """Folder where a machine's processes share metrics; by default a private one, then removed."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe message that is logged; each request is one line at INFO."""

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Settings of the environment, then `overrides`. Raises SettingsError."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            raise SettingsError(
                problems(error, name=lambda place: variable(str(place[0])))
            ) from error

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        check_names([*os.environ, *map(variable, values)])
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_bytes_in_flight < self.max_document_bytes:
            raise ValueError(
                "GMA_MAX_BYTES_IN_FLIGHT is less than GMA_MAX_DOCUMENT_BYTES: the largest document "
                "would never be admitted"
            )
        if self.models is not None and "checkpoint" in self.model_fields_set:
            raise ValueError(
                "GMA_CHECKPOINT and GMA_MODELS are both set: name that model in GMA_MODELS too"
            )
        if self.models == {}:
            raise ValueError("GMA_MODELS names no model")
        if f"{self.path_prefix}/".startswith("/v1/"):
            raise ValueError("GMA_PATH_PREFIX begins as the service's own paths do, with /v1")
        if (self.key_documents_per_minute or self.key_bytes_per_day) and not self.api_keys_file:
            raise ValueError(
                "GMA_KEY_DOCUMENTS_PER_MINUTE and GMA_KEY_BYTES_PER_DAY are of API keys: they need "
                "GMA_API_KEYS_FILE"
            )
        if self.runtime == "torch":
            if self.dtype == "float16":
                raise ValueError("GMA_DTYPE=float16 needs an exported model")
            if self.ops_library != "auto":
                raise ValueError("GMA_OPS_LIBRARY needs an exported model")
            # On a GPU that is yet to be found a chunk may be longer: whoever finds it asks again.
            self.grid(on_gpu=self.device == "cuda")
        return self

    @property
    def runtime(self) -> Literal["torch", "onnx"]:
        """What runs the model; auto takes torch where the folder holds neither kind of model."""
        if self.backend != "auto":
            return self.backend
        return "onnx" if self.holds_export and not self.holds_checkpoint else "torch"

    @property
    def holds_checkpoint(self) -> bool:
        """Whether there are weights of a checkpoint in the model's folder."""
        return (self.checkpoint / "model.safetensors").exists()

    @property
    def holds_export(self) -> bool:
        """Whether there is an exported model in the model's folder."""
        return (self.checkpoint / "model.onnx").exists()

    def check_device(self, *, on_gpu: bool) -> None:
        """Raises ValueError for what such a device does not allow."""
        if self.runtime == "torch":
            if self.dtype == "fp8" and not on_gpu:
                raise ValueError("GMA_DTYPE=fp8 needs a GPU")
            if self.dtype == "int8" and on_gpu:
                raise ValueError("GMA_DTYPE=int8 is for the CPU: GMA_DEVICE=cpu")
            self.grid(on_gpu=on_gpu)

    def grid(self, *, on_gpu: bool, fixed_chunk: int | None = None) -> tuple[int, int]:
        """Rows and tokens a row of the full step on such a device.

        `fixed_chunk`: tokens a row of a model that takes no other. Raises ValueError if others
        were asked for, and if a row is longer than an inbox.
        """
        rows, chunk = GPU_GRID if on_gpu else CPU_GRID
        chunk = self.chunk_tokens or fixed_chunk or chunk
        if fixed_chunk not in (None, chunk):
            raise ValueError(
                f"GMA_CHUNK_TOKENS is {chunk}, but {self.checkpoint} was exported for chunks of "
                f"{fixed_chunk}: leave it out, or export the checkpoint again"
            )
        if self.inbox_tokens < chunk:
            raise ValueError(
                f"GMA_INBOX_TOKENS is less than GMA_CHUNK_TOKENS, which is {chunk}: no chunk would "
                "ever fill"
            )
        return self.rows or rows, chunk


def variable(field: str) -> str:
    """The environment variable that sets `field`."""
    return PREFIX + field.upper()


def check_names(environ: Iterable[str]) -> None:
    """Raises ValueError for a `GMA_*` variable that sets nothing: typos must not go unnoticed."""
    known = {variable(field) for field in Settings.model_fields}
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            close = get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
            raise ValueError(f"{name} is not a setting: {hint}")
