"""`gma batch` that was cut short goes on; what is not the same work is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gma.service.batch.output import Output
from gma.service.batch.reader import Reader
from gma.service.runners.torch import TorchRunner
from tests.service.asgi import TEXT, save_checkpoint
from tests.service.batch.archive import PART_BYTES, answers, by_id, texts, write_jsonl
from tests.service.batch.conftest import Run

OUT = Path("out")
COMMAND = ("a.jsonl", "--out", OUT, "--part-bytes", PART_BYTES)
COUNT = 40

# Stops for ever when a part's file is written and has not got its name yet.
HELD = """
import os, sys, threading
from gma.service.batch import output
from gma.service.cli.main import main

fsync, written = os.fsync, []

def hold(file):
    fsync(file)
    written.append(file)
    if len(written) == 4:
        print("held", flush=True)
        threading.Event().wait()

output.os.fsync = hold
sys.argv = ["gma", *sys.argv[1:]]
main()
"""


@pytest.fixture(autouse=True)
def _archive(batch: Run) -> None:
    """In the folder that `batch` runs in."""
    write_jsonl(Path("a.jsonl"), [{"text": text, "n": n} for n, text in enumerate(texts(COUNT))])


def parts() -> dict[str, int]:
    """The files of parts, and when each was written."""
    return {each.name: each.stat().st_mtime_ns for each in OUT.glob("part-*")}


def check_whole() -> None:
    """Check that each text has one answer."""
    assert by_id(OUT).keys() == {f"a.jsonl:{n}" for n in range(1, COUNT + 1)}
    assert {row["error"] for row in answers(OUT)} == {None}
    assert [each.name for each in OUT.iterdir() if each.name.startswith(".")] == []
    assert (OUT / "_SUCCESS").exists()


def test_after_an_error_only_what_is_left_is_read(
    batch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Output.put

    def full(self: Output, name: str, data: bytes) -> None:
        if len(parts()) >= 3:
            raise OSError(28, "No space left on device", name)
        put(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "put", full)
        result = batch(*COMMAND)
    assert result.status == 1
    assert "No space left on device" in result.err
    assert not (OUT / "_SUCCESS").exists()
    before = parts()
    result = batch(*COMMAND)
    assert result.status == 0
    left = len(parts()) - len(before)
    assert left > 0
    assert f"({left} parts, beside {len(before)} that were there)" in result.out
    assert parts().items() > before.items()
    check_whole()


def test_after_kill_9(batch: Run, checkpoint: Path) -> None:
    arguments = ["batch", "--checkpoint", str(checkpoint), *map(str, COMMAND)]
    with subprocess.Popen(
        [sys.executable, "-c", HELD, *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    ) as killed:
        assert killed.stdout
        assert killed.stdout.readline() == b"held\n"
        killed.send_signal(signal.SIGKILL)
    before = parts()
    assert before
    assert [each for each in OUT.iterdir() if each.name.endswith(".tmp")]
    assert batch(*COMMAND).status == 0
    assert parts().items() > before.items()
    check_whole()


def test_what_is_complete_is_not_read_again(batch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch(*COMMAND).status == 0
    before = parts()
    monkeypatch.delattr(Reader, "read")
    result = batch(*COMMAND)
    assert (result.status, result.out) == (0, "out is complete: there is nothing left to do\n")
    assert parts() == before


@pytest.mark.parametrize("given", ["in", "in/**"])
def test_answers_may_lie_below_what_is_read(batch: Run, given: str) -> None:
    """They are not read when the work goes on."""
    Path("in").mkdir()
    for name in "ab":
        Path("in", name).write_text(TEXT)
    out = Path("in/out")
    options = (given, "--out", out, "--part-bytes", 1)
    assert batch(*options).status == 0
    (out / "part-00000.parquet").unlink()
    assert "(1 parts, beside 1 that were there)" in batch(*options).out
    assert len(by_id(out)) == 2


def test_a_full_disk_is_told_and_gets_nothing_more(
    batch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.txt").write_text(TEXT)
    sync = os.fsync

    def full(file: int) -> None:
        if "part-" in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(28, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = batch("a.txt", "--out", "out")
    assert result.status == 1
    assert "out/part-00000.parquet: No space left on device" in result.err
    assert [file.name for file in Path("out").iterdir()] == ["_manifest.json"]
    assert batch("a.txt", "--out", "out").status == 0


def test_a_part_that_is_lost_later_is_read_again(batch: Run) -> None:
    batch(*COMMAND)
    before = [(row["id"], row["label"]) for row in answers(OUT)]
    (OUT / "part-00002.parquet").unlink()
    assert "(1 parts, beside " in batch(*COMMAND).out
    assert [(row["id"], row["label"]) for row in answers(OUT)] == before


def test_a_step_that_fails_ends_the_work_and_spoils_nothing(
    batch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def failing(self: TorchRunner, given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 20:
            raise RuntimeError("the device is on fire")
        return launch(self, given)

    launch = TorchRunner.launch
    with monkeypatch.context() as patch:
        patch.setattr(TorchRunner, "launch", failing)
        result = batch(*COMMAND)
    assert result.status == 1
    assert "a step of the model failed" in result.err
    assert {row["error"] for row in answers(OUT)} <= {None}
    assert batch(*COMMAND).status == 0
    check_whole()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--evidence"], "--evidence was not given and is given"),
        (["--top-k", 2], "--top-k was not given and is 2"),
        (["--text", "n", "--keep", "n"], "--text was text and is n; --keep was not given and is n"),
        (["--format", "jsonl"], "--format was parquet and is jsonl"),
        (["--part-bytes", 9], f"--part-bytes was {PART_BYTES} and is 9"),
    ],
)  # fmt: skip
def test_other_options_are_refused(batch: Run, options: list[object], why: str) -> None:
    batch(*COMMAND)
    before = parts()
    result = batch(*COMMAND, *options)
    assert result.status == 1
    assert result.err.startswith(f"gma: out was begun otherwise: {why}: give the same again")
    assert parts() == before


def test_another_model_is_refused(batch: Run, tmp_path: Path) -> None:
    batch(*COMMAND)
    other = save_checkpoint(tmp_path / "other", prior_tokens=21.0)
    result = batch(*COMMAND, "--checkpoint", other)
    assert result.status == 1
    assert "with another model (tiny, " in result.err


def test_other_inputs_are_refused(batch: Run) -> None:
    batch(*COMMAND)

    def refused(*inputs: str) -> str:
        result = batch(*inputs, *COMMAND[1:])
        assert result.status == 1
        return result.err

    write_jsonl(Path("b.jsonl"), [{"text": TEXT}])
    assert "b.jsonl was not there" in refused("a.jsonl", "b.jsonl")
    assert "a.jsonl is no longer there (and 1 more)" in refused("b.jsonl")
    size = Path("a.jsonl").stat()
    os.utime("a.jsonl", ns=(size.st_atime_ns, size.st_mtime_ns + 10**9))
    assert "a.jsonl has changed" in refused("a.jsonl")


def test_a_manifest_that_is_damaged_is_named(batch: Run) -> None:
    batch(*COMMAND)
    (OUT / "_manifest.json").write_text('{"model": 3}')
    result = batch(*COMMAND)
    assert result.status == 1
    assert result.err.startswith("gma: out/_manifest.json: it can't be read: ")
