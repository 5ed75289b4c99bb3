"""GMA_MODELS: names and folders, or a file of them, and what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gma.model.config import DEFAULT_CHECKPOINT
from gma.service.app.models_file import ModelsFile, Wanted, models_of
from gma.service.app.placement import check_room, device_of, gpus_of
from gma.service.app.start import StartError, check_model
from gma.service.settings import Settings, SettingsError

BOOKS = DEFAULT_CHECKPOINT.parent / "books"


class TestShortForm:
    def test_names_folders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GMA_MODELS", "books=books, mine = runs/mine/checkpoint")
        models = models_of(Settings.load(rows=4))
        assert [*models] == ["books", "mine"]
        assert models["books"].checkpoint == BOOKS
        assert models["mine"].checkpoint == Path("runs/mine/checkpoint")
        assert [each.rows for each in models.values()] == [4, 4]
        assert models["books"].models is None

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("", "GMA_MODELS names no model"),
            ("a=x,b", "GMA_MODELS: name=path is expected, and not 'b'"),
            ("a=x,a=y", "GMA_MODELS: a is there twice"),
            ("a b=x", "GMA_MODELS: 'a b' is no name: one has letters, [^;]*$"),
            ("a=", "GMA_MODELS: name=path is expected, and not 'a='"),
            (f"{'a' * 65}=x", "GMA_MODELS: 'a{65}' is no name: .*64 at most"),
        ],
    )
    def test_what_is_wrong_stops_the_start(
        self, value: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GMA_MODELS", value)
        with pytest.raises(SettingsError, match=message):
            Settings.load()

    def test_there_is_one_way_to_name_them(self) -> None:
        with pytest.raises(SettingsError, match="GMA_CHECKPOINT and GMA_MODELS are both set"):
            Settings.load(checkpoint="books", models="a=b")


class TestFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "models.toml"

    def models(self, file: Path, text: str, **settings: Any) -> dict[str, Settings]:
        file.write_text(text)
        return models_of(Settings.load(models=file, **settings))

    def test_a_table_a_model(self, file: Path) -> None:
        text = """
            [books]
            checkpoint = "books"
            workers = 2
            page_memory = "1GiB"
            ["v1.2"]
            checkpoint = "elsewhere"
        """
        models = self.models(file, text, slots=7, log_level="ERROR")
        assert [*models] == ["books", "v1.2"]
        books, other = models.values()
        assert (books.checkpoint, books.workers, books.page_memory) == (BOOKS, 2, 2**30)
        assert (other.checkpoint, other.workers) == (Path("elsewhere"), 1)
        assert (books.slots, other.slots, books.log_level) == (7, 7, "ERROR")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "it names no model"),
            ("[a", "models.toml: "),
            ("a = 1", "a is no table"),
            ("[a]", r"\[a\]: checkpoint is missing"),
            ('[a]\ncheckpoint = ""', r"\[a\]: checkpoint is missing"),
            (f'[a]\ncheckpoint = "{"x" * 5000}"', "models.toml: .*File name too long"),
            ("a = " + "[" * 5000, "models.toml: maximum recursion depth"),
            ('["a b"]\ncheckpoint = "x"', r"\[a b\] is no name: one has letters"),
            ('[a]\ncheckpoint = "x"\nrow = 1', r"\[a\]: row is unknown: did you mean rows\?"),
            ('[a]\ncheckpoint = "x"\nzzz = 1', r"\[a\]: zzz is unknown: there are checkpoint, "),
            ('[a]\ncheckpoint = "x"\nport = 1', r"\[a\]: port is a setting of the whole service"),
            ('[a]\ncheckpoint = "x"\nrows = -1', r"\[a\]: GMA_ROWS: input should be greater"),
            ('[a]\ncheckpoint = "x"\ndtype = "float16"', r"\[a\]: GMA_DTYPE=float16 needs an"),
        ],
    )
    def test_what_is_wrong(self, text: str, message: str, file: Path) -> None:
        with pytest.raises(StartError, match=message) as raised:
            self.models(file, text)
        assert str(raised.value).startswith(f"{file}: ")

    def test_there_is_none(self, file: Path) -> None:
        with pytest.raises(StartError, match=r"models\.toml can't be read: No such file"):
            models_of(Settings.load(models=file))

    def test_a_change_is_seen(self, file: Path, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        text = f'[a]\ncheckpoint = "{folder}"\n'
        file.write_text(text)
        watched = ModelsFile(Settings.load(models=file))
        before = watched.look()
        assert watched.look() == before
        file.write_text(text + "rows = 3\n")
        assert watched.look() == before  # it may be half of what is being written
        after = watched.look()
        assert (before["a"].settings.rows, after["a"].settings.rows) == (0, 3)
        file.write_text("nonsense")
        with pytest.raises(StartError):
            watched.look()
        assert watched.look() == after  # and is told once

    def test_a_folder_that_never_rests_holds_up_no_other(self, file: Path, tmp_path: Path) -> None:
        tables = {name: f'[{name}]\ncheckpoint = "{tmp_path / name}"\n' for name in "abc"}
        (tmp_path / "a").mkdir()
        file.write_text(tables["a"] + tables["b"])
        watched = ModelsFile(Settings.load(models=file))
        before = watched.look()["a"]
        file.write_text(tables["a"] + tables["c"])
        for n, names in enumerate(("ab", "ac")):
            (tmp_path / "a" / "log").write_text("x" * n)
            seen = watched.look()
            assert ("".join(seen), seen["a"]) == (names, before)

    def test_a_path_that_can_be_none_is_a_model_s_that_can_t_be_used(self, file: Path) -> None:
        file.write_text('[a]\ncheckpoint = "x\\u0000y"\n')
        watched = ModelsFile(Settings.load(models=file))
        assert watched.look()["a"].files == ()
        with pytest.raises(StartError, match="is not a checkpoint: there is no such folder"):
            check_model(watched.look()["a"].settings)

    def test_a_change_in_a_folder_is_seen(self, tmp_path: Path) -> None:
        settings = Settings.load(checkpoint=tmp_path)
        seen = [Wanted.of(settings)]
        weights = tmp_path / "model.safetensors"
        for content in ("a", "bb"):
            weights.write_text(content)
            seen.append(Wanted.of(settings))
        os.utime(weights, (1, 1))
        seen.append(Wanted.of(settings))
        assert len(set(map(str, seen))) == 4
        for name in ("README.md", ".model.safetensors.part"):
            (tmp_path / name).touch()
        assert Wanted.of(settings) == seen[-1]
        assert Wanted.of(Settings.load(checkpoint=tmp_path / "nowhere")).files == ()


class TestGpus:
    def settings(self, workers: int = 1, share: float = 1.0, device: str = "cuda") -> Settings:
        return Settings.load(workers=workers, gpu_share=share, device=device)

    @pytest.mark.parametrize(
        ("models", "gpus"),
        [
            ([], 0),
            ([(1, 1.0)], 1),
            ([(3, 1.0)], 3),
            ([(2, 0.5)], 1),
            ([(3, 0.5)], 2),
            ([(3, 0.3), (1, 0.1)], 1),
            ([(1, 0.6), (2, 0.4), (1, 0.6)], 2),
            ([(2, 0.7)], 2),
        ],
    )
    def test_are_shared(self, models: list[tuple[int, float]], gpus: int) -> None:
        assert gpus_of([self.settings(*each) for each in models]) == gpus

    def test_have_to_be_there(self) -> None:
        assert device_of(self.settings(2, 0.5), gpus=1) == "cuda"
        with pytest.raises(StartError, match="3 workers on cuda need 2 GPUs; there are 1"):
            device_of(self.settings(3, 0.5), gpus=1)
        check_room([self.settings(1, 0.5), self.settings(1, 0.5)], 1)
        check_room([self.settings(5, device="cpu"), self.settings()], 1)
        with pytest.raises(StartError, match="the models need 2 GPUs in all, and there are 1"):
            check_room([self.settings(1, 0.5), self.settings()], 1)
