"""The private folder of a run, and what is cleared of one that died, and of nobody else."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gma.service.app.run import LOCK, MARK, PREFIX, clear_dead, run_folder
from gma.service.app.start import StartError
from gma.service.app.stderr import STDERR, given_stderr, shared_stderr

RUN = """
import sys
from gma.service.app.run import run_folder
with run_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TMPDIR. pytest's own is too deep for sockets."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts processes, and ends those that live."""
    pipe = subprocess.PIPE
    with ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                arguments, stdin=pipe, stdout=pipe, text=True, env=os.environ | environment
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            # It runs the program by now, but may not be known by its environment yet.
            environ = Path(f"/proc/{process.pid}/environ")
            while process.poll() is None and not environ.read_bytes():
                os.sched_yield()
            return process

        yield start


def started(spawn: Spawn) -> tuple[subprocess.Popen[str], Path]:
    """A run, and its folder."""
    process = spawn(sys.executable, "-c", RUN)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_is_private_and_gone_at_the_end(temporary: Path) -> None:
    before = os.umask(0)
    try:
        with run_folder() as folder:
            assert folder.parent == temporary
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "more").mkdir()
    finally:
        os.umask(before)
    assert not list(temporary.iterdir())


def test_a_dead_runs_folder_and_processes_are_cleared(spawn: Spawn, temporary: Path) -> None:
    run, folder = started(spawn)
    left = spawn("sleep", "60", **{MARK: str(folder)})
    stopped = spawn("sleep", "60", **{MARK: str(folder)})
    stopped.send_signal(signal.SIGSTOP)
    run.kill()
    run.wait()
    assert clear_dead(temporary)
    assert not list(temporary.iterdir())
    assert left.wait() == stopped.wait() == -signal.SIGKILL


def test_a_run_that_lives_is_left_alone(spawn: Spawn, temporary: Path) -> None:
    _, folder = started(spawn)
    its = spawn("sleep", "60", **{MARK: str(folder)})
    assert not clear_dead(temporary)
    assert folder.exists()
    assert its.poll() is None


def test_processes_that_are_not_of_the_run_are_left_alone(spawn: Spawn, temporary: Path) -> None:
    run, folder = started(spawn)
    others = [
        spawn("sleep", "60"),
        spawn("sleep", "60", **{MARK: f"{folder}x"}),
        spawn("sleep", "60", ANOTHER=str(folder)),
    ]
    run.kill()
    run.wait()
    clear_dead(temporary)
    assert not folder.exists()
    assert [other.poll() for other in others] == [None] * 3


def test_folders_that_only_look_like_a_runs_are_left_alone(temporary: Path) -> None:
    named = temporary / f"{PREFIX}mine"
    named.mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    linked = temporary / f"{PREFIX}lock"
    linked.mkdir()
    (linked / LOCK).symlink_to(elsewhere / LOCK)
    before = set(temporary.rglob("*"))
    clear_dead(temporary)
    assert set(temporary.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_another_users_folder_is_left_alone(temporary: Path) -> None:
    folder = temporary / f"{PREFIX}theirs"
    folder.mkdir()
    (folder / LOCK).touch()
    os.chown(folder, 12345, 12345)
    clear_dead(temporary)
    assert (folder / LOCK).exists()


class TestTellsInOneLine:
    def check(self, message: str) -> None:
        with pytest.raises(StartError, match=message) as raised, run_folder():
            pass
        assert "\n" not in str(raised.value)

    def test_a_folder_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", "/nowhere")
        self.check("can't keep files in /nowhere: No such file or directory. TMPDIR chooses")

    def test_a_disk_that_is_full(self, monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
        def full(*_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        self.check(f"can't keep files in {temporary}: No space left on device")
        assert not list(temporary.iterdir())

    def test_a_path_too_long_for_sockets(
        self, monkeypatch: pytest.MonkeyPatch, temporary: Path
    ) -> None:
        deep = temporary / ("long" * 10)
        deep.mkdir()
        monkeypatch.setenv("TMPDIR", str(deep))
        self.check("is too long for sockets")
        assert not list(deep.iterdir())


TELL = """
import logging, sys
from pathlib import Path
from gma.service.app.stderr import given_stderr
from gma.service.observe import logs
logs.configure("INFO", given_stderr(Path(sys.argv[1])))
for n in range(int(sys.argv[2])):
    logging.getLogger("gma").info("again")
"""


def test_lines_of_other_processes_are_in_one_place(
    temporary: Path, capfd: pytest.CaptureFixture[str], spawn: Spawn
) -> None:
    """Every one of them, though they are alike."""
    with shared_stderr(temporary / STDERR):
        telling = [
            spawn(sys.executable, "-c", TELL, str(temporary / STDERR), "300") for _ in range(2)
        ]
        assert [process.wait() for process in telling] == [0, 0]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 600
    assert all('"message": "again"' in line for line in lines)


def test_nobody_gives_a_stderr(temporary: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        given_stderr(temporary / STDERR)
