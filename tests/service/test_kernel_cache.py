"""A start says whether its kernels are there, and what they were made for if not."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from gma.service.runners import kernel_cache

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
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "elsewhere:Manager")
    kernel_cache.use(tmp_path)
    kernel_cache.record(tmp_path, WANTED)
    assert Path(os.environ["TRITON_CACHE_DIR"]) == tmp_path / "kernels"
    assert json.loads((tmp_path / "manifest.json").read_text()) == WANTED


class TestKernels:
    """Through what Triton calls."""

    KEY = "ab12"

    @pytest.fixture(autouse=True)
    def _environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
        monkeypatch.setenv("TRITON_CACHE_MANAGER", "elsewhere:Manager")
        kernel_cache.use(tmp_path / "made")

    def cache(self) -> Any:
        from triton.runtime.cache import get_cache_manager

        return get_cache_manager(self.KEY)

    def compile(self) -> dict[str, str]:
        cache = self.cache()
        group = {name: cache.put(name.encode(), name) for name in ("k.json", "k.cubin")}
        cache.put_group("k.json", group)
        return group

    def test_are_found_where_they_were_made(self) -> None:
        assert self.cache().get_group("k.json") is None
        assert self.compile() == self.cache().get_group("k.json")

    def test_are_found_where_the_folder_was_carried_to(self, tmp_path: Path) -> None:
        self.compile()
        carried = (tmp_path / "made").rename(tmp_path / "carried")
        kernel_cache.use(carried)
        group = self.cache().get_group("k.json")
        assert group is not None
        assert {name: Path(path).read_text() for name, path in group.items()} == {
            "k.json": "k.json",
            "k.cubin": "k.cubin",
        }
        assert all(Path(path).is_relative_to(carried) for path in group.values())

    def test_are_compiled_again_if_a_file_is_missing(self) -> None:
        Path(self.compile()["k.cubin"]).unlink()
        assert self.cache().get_group("k.json") is None

    def test_go_elsewhere_if_the_folder_cannot_be_written(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "made").touch()  # root may write to a folder whatever its mode
        with caplog.at_level(logging.WARNING):
            group = self.compile()
        assert self.cache().get_group("k.json") == group
        assert not any(Path(path).is_relative_to(tmp_path) for path in group.values())
        assert "made/kernels lacks kernels and can't be written" in caplog.text
