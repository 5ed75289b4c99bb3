"""Settings: what stops the start, and what it says."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from gma.model.config import DEFAULT_CHECKPOINT
from gma.service.settings import Settings, SettingsError, variable


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(variable(field), raising=False)


def test_defaults_are_this_machine_only_and_the_packaged_model() -> None:
    settings = Settings.load()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.checkpoint == DEFAULT_CHECKPOINT


def test_a_checkpoint_that_comes_with_gma_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMA_CHECKPOINT", "books")
    assert Settings.load().checkpoint == DEFAULT_CHECKPOINT.parent / "books"


def test_reads_the_environment_and_overrides_go_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMA_PORT", "8001")
    monkeypatch.setenv("GMA_CHECKPOINT", "runs/mine")
    monkeypatch.setenv("gma_rows", "3")
    monkeypatch.setenv("GMA_MAX_DOCUMENT_BYTES", "1MiB")
    settings = Settings.load(port=8002)
    assert settings.port == 8002
    assert settings.checkpoint == Path("runs/mine")
    assert settings.rows == 3
    assert settings.max_document_bytes == 2**20


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GMA_PROT", "8001", "GMA_PROT is not a setting: did you mean GMA_PORT?"),
        ("GMA_ZZZZZZZZ", "1", "GMA_ZZZZZZZZ is not a setting: there are GMA_API_KEYS_FILE,"),
        ("gma_prot", "8001", "gma_prot is not a setting"),
        ("GMA_PORT", "99999", "GMA_PORT: input should be less than 65536, not '99999'"),
        ("GMA_HOST", "", "GMA_HOST: "),  # all addresses, to a socket
        ("GMA_ROWS", "many", "GMA_ROWS: input should be a valid integer"),
        ("GMA_ROWS", "", "GMA_ROWS: "),
        ("GMA_ROWS", "-1", "GMA_ROWS: input should be greater than or equal to 0, not '-1'"),
        ("GMA_CHUNK_TOKENS", "-1", "GMA_CHUNK_TOKENS: "),
        ("GMA_DTYPE", "fp16", "GMA_DTYPE: input should be 'auto', 'float32', 'float16', "),
        ("GMA_DTYPE", "float16", "GMA_DTYPE=float16 needs an exported model"),
        ("GMA_BACKEND", "jax", "GMA_BACKEND: input should be 'auto', 'torch' or 'onnx', not 'jax'"),
        ("GMA_OPS_LIBRARY", "none", "GMA_OPS_LIBRARY needs an exported model"),
        ("GMA_ONNX_MEMORY", "0", "GMA_ONNX_MEMORY: "),
        ("GMA_DEVICE", "tpu", "GMA_DEVICE: input should be 'auto', 'cpu' or 'cuda', not 'tpu'"),
        ("GMA_IDLE_TIMEOUT_S", "inf", "GMA_IDLE_TIMEOUT_S: "),
        ("GMA_MAX_DOCUMENT_BYTES", "1 parsec", "GMA_MAX_DOCUMENT_BYTES: "),
        ("GMA_MAX_DOCUMENT_BYTES", "1GiB", "GMA_MAX_BYTES_IN_FLIGHT is less than"),
        ("GMA_INBOX_TOKENS", "255", "GMA_INBOX_TOKENS is less than GMA_CHUNK_TOKENS, which is 256"),
        ("GMA_SESSIONS", "s3://bucket", "GMA_SESSIONS: "),
        ("GMA_SESSION_TTL_S", "0", "GMA_SESSION_TTL_S: "),
        ("GMA_CHUNK_TOKENS", "70000", "GMA_INBOX_TOKENS is less than"),
    ],
)
def test_what_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as raised:
        Settings.load()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_all_that_is_wrong_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMA_PORT", "0")
    monkeypatch.setenv("GMA_SLOTS", "0")
    with pytest.raises(SettingsError, match=r"GMA_PORT: .*; GMA_SLOTS: "):
        Settings.load()


def test_an_inbox_holds_the_devices_chunk() -> None:
    assert Settings.load(inbox_tokens=256, device="cpu").inbox_tokens == 256
    assert Settings.load(inbox_tokens=8, chunk_tokens=8, device="cuda").inbox_tokens == 8
    with pytest.raises(SettingsError, match="GMA_CHUNK_TOKENS, which is 512"):
        Settings.load(inbox_tokens=511, device="cuda")


@pytest.mark.parametrize(
    ("given", "on_gpu", "grid"),
    [
        ({}, False, (8, 256)),
        ({}, True, (64, 512)),
        ({"rows": 3}, True, (3, 512)),
        ({"chunk_tokens": 7}, False, (8, 7)),
    ],
)
def test_a_grid_is_the_devices_unless_it_is_given(
    given: dict[str, int], on_gpu: bool, grid: tuple[int, int]
) -> None:
    assert Settings.load(**given).grid(on_gpu=on_gpu) == grid


@pytest.mark.parametrize("given", [{}, {"chunk_tokens": 384}])
def test_an_exported_model_has_its_own_chunk(given: dict[str, int]) -> None:
    settings = Settings.load(backend="onnx", **given)
    assert settings.grid(on_gpu=False, fixed_chunk=384) == (8, 384)
    assert settings.grid(on_gpu=True, fixed_chunk=384) == (64, 384)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunk_tokens": 256}, "GMA_CHUNK_TOKENS is 256, but .* exported for chunks of 384: "),
        ({"inbox_tokens": 300}, "GMA_INBOX_TOKENS is less than GMA_CHUNK_TOKENS, which is 384"),
    ],
)
def test_a_chunk_that_an_exported_model_does_not_read(given: dict[str, int], message: str) -> None:
    settings = Settings.load(backend="onnx", **given)
    with pytest.raises(ValueError, match=message):
        settings.grid(on_gpu=False, fixed_chunk=384)


@pytest.mark.parametrize(
    ("value", "library"),
    [("auto", "auto"), ("none", "none"), ("lib/libgma_ops.so", Path("lib/libgma_ops.so"))],
)
def test_a_library_is_a_file_or_a_word(
    monkeypatch: pytest.MonkeyPatch, value: str, library: Path | str
) -> None:
    monkeypatch.setenv("GMA_BACKEND", "onnx")
    monkeypatch.setenv("GMA_OPS_LIBRARY", value)
    assert Settings.load().ops_library == library


def test_an_unknown_variable_stops_every_way_to_make_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GMA_PROT", "8001")
    with pytest.raises(ValueError, match="GMA_PROT is not a setting"):
        Settings()


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"GMA_PROT is not a setting: did you mean GMA_PORT\?"):
        Settings.load(prot=1)


def test_other_processes_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.load(port=8001)
    data = pickle.dumps(settings)
    monkeypatch.setenv("GMA_PORT", "8002")
    assert pickle.loads(data) == settings  # noqa: S301


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize("given", ["64MiB or so", "1e+6", "1 GB,", "1EB", "lots"])
def test_a_size_that_is_none(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("GMA_MAX_DOCUMENT_BYTES", given)
    with pytest.raises(SettingsError, match=r"GMA_MAX_DOCUMENT_BYTES.*as 64MiB"):
        Settings.load()
