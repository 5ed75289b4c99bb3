"""A start says whether its kernels are there, and what they were made for if not."""

import json
import os
from pathlib import Path

import pytest

from service import kernel_cache

WANTED = kernel_cache.Manifest(
    fingerprint="ab12", gpu="a GPU", torch="2.11", triton="3.6", dtype="bfloat16", grids=["1 x 512"]
)


def test_says_that_nothing_is_there(tmp_path: Path) -> None:
    assert "no kernels yet" in kernel_cache.verdict(tmp_path / "none", WANTED)


def test_says_that_all_is_there(tmp_path: Path) -> None:
    kernel_cache.record(tmp_path / "made", WANTED)
    assert kernel_cache.verdict(tmp_path / "made", WANTED).endswith("has the kernels")


@pytest.mark.parametrize(
    ("name", "value"), [("fingerprint", "cd34"), ("triton", "3.7"), ("gpu", "another")]
)
def test_names_what_differs(tmp_path: Path, name: str, value: str) -> None:
    other = WANTED.copy()
    other[name] = value  # type: ignore[literal-required]
    kernel_cache.record(tmp_path, other)
    said = kernel_cache.verdict(tmp_path, WANTED)
    assert f"{name} {value}, not {WANTED[name]}" in said  # type: ignore[literal-required]
    assert said.count(", not ") == 1


@pytest.mark.parametrize("content", ["", "[", '"text"', "[1]"])
def test_survives_a_broken_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert "can't be read" in kernel_cache.verdict(tmp_path, WANTED)


def test_is_json_and_where_triton_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    kernel_cache.use(tmp_path)
    kernel_cache.record(tmp_path, WANTED)
    assert Path(os.environ["TRITON_CACHE_DIR"]) == tmp_path / "kernels"
    assert json.loads((tmp_path / "manifest.json").read_text()) == WANTED
