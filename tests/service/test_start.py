"""What keeps the service from starting, and that it says so; how signals stop it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gma.service.app import local
from gma.service.app.ray import LOOPBACK, STOP_SIGNALS, start_ray
from gma.service.app.run import MARK
from gma.service.app.start import StartError, last_exception, reason
from gma.service.http.port import bound
from gma.service.settings import Settings
from tests.service.asgi import save_checkpoint
from tests.service.running import free_port


class TestBeforeRay:
    """What stops it before Ray is started."""

    @pytest.fixture(autouse=True)
    def without_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*_: object) -> None:
            raise AssertionError("Ray is started")

        monkeypatch.setattr(local, "start_ray", start)

    def check(self, message: str, **settings: Any) -> None:
        with pytest.raises(StartError, match=message) as raised:
            local.serve_forever(Settings.load(**settings))
        assert "\n" not in str(raised.value)

    def test_without_a_checkpoint(self, tmp_path: Path) -> None:
        self.check("nowhere is not a checkpoint", checkpoint=tmp_path / "nowhere")

    def test_with_a_malformed_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"name": "x"}')
        self.check(r"config\.json: labels is missing", checkpoint=tmp_path)

    def test_with_keys_that_cannot_be_used(self, checkpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        self.check("API keys can't be read: ", checkpoint=checkpoint, api_keys_file=file)
        file.touch()
        self.check("has no API keys", checkpoint=checkpoint, api_keys_file=file)

    def test_with_models_of_which_one_is_none(self, checkpoint: Path, tmp_path: Path) -> None:
        models = f"one={checkpoint},two={tmp_path}/nowhere"
        self.check("two: .*nowhere is not a checkpoint", models=models)
        self.check("models.toml can't be read", models=tmp_path / "models.toml")

    def test_with_more_models_than_gpus(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local, "count_gpus", lambda: 1)
        models = f"one={checkpoint},two={checkpoint}"
        self.check(
            "the models need 2 GPUs in all, and there are 1", models=models, port=free_port()
        )

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
    def test_with_half_a_checkpoint(self, name: str, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path)
        (folder / name).unlink()
        self.check(f"is not a checkpoint: it has no {name}", checkpoint=folder)

    @pytest.mark.parametrize(
        ("settings", "gpus", "message"),
        [
            ({"device": "cuda"}, 0, "1 workers on cuda need as many GPUs; there are 0"),
            ({"workers": 3}, 2, "3 workers on cuda need as many GPUs; there are 2"),
            ({"dtype": "fp8"}, 0, "GMA_DTYPE=fp8 needs a GPU"),
            ({"inbox_tokens": 300}, 1, "GMA_INBOX_TOKENS is less than GMA_CHUNK_TOKENS"),
        ],
    )
    def test_with_settings_for_another_machine(
        self,
        settings: dict[str, Any],
        gpus: int,
        message: str,
        checkpoint: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(local, "count_gpus", lambda: gpus)
        self.check(message, checkpoint=checkpoint, port=free_port(), **settings)

    def test_with_metrics_that_cannot_be_kept(self, checkpoint: Path) -> None:
        self.check(
            "can't keep metrics in /proc/x: .*GMA_METRICS_DIR chooses",
            checkpoint=checkpoint,
            port=free_port(),
            metrics_dir=Path("/proc/x"),
        )

    def test_with_a_port_that_is_taken(self, checkpoint: Path) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            self.check(f"can't listen on 127.0.0.1:{port}: ", checkpoint=checkpoint, port=port)


class Terminal(io.StringIO):
    """Has a person at it who sends a signal at a word, and may be closed then."""

    def __init__(self, life: list[str], word: str, number: signal.Signals, gone: bool) -> None:
        super().__init__()
        self.life, self.word, self.number, self.gone = life, word, number, gone

    def write(self, line: str) -> int:
        self.life.append(line.split()[0])
        if line.startswith(self.word):
            os.kill(os.getpid(), self.number)
        elif self.gone:
            raise OSError(5, "Input/output error")
        return len(line)


class TestSignals:
    @pytest.fixture
    def life(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What happens to a service that is none."""
        life: list[str] = []

        @contextmanager
        def running(settings: Settings) -> Iterator[None]:
            life.append("start")
            yield
            life.append("end")

        monkeypatch.setattr(local, "running", running)
        monkeypatch.setattr(local, "drain", lambda timeout_s: life.append(f"drain {timeout_s}"))
        return life

    @pytest.mark.parametrize("gone", [False, True])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_the_first_drains(
        self,
        life: list[str],
        number: signal.Signals,
        gone: bool,
        checkpoint: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(sys, "stdout", Terminal(life, "Ready", number, gone))
        before = [signal.getsignal(each) for each in STOP_SIGNALS]
        local.serve_forever(Settings.load(checkpoint=checkpoint, shutdown_timeout_s=7))
        assert life == ["start", "Ready", "Stopping:", "drain 7.0", "end"]
        assert [signal.getsignal(each) for each in STOP_SIGNALS] == before

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_one_before_it_is_ready_ends_what_was_started(
        self,
        number: signal.Signals,
        checkpoint: Path,
        monkeypatch: pytest.MonkeyPatch,
        life: list[str],
    ) -> None:
        @contextmanager
        def starting(settings: Settings) -> Iterator[None]:
            life.append("start")
            try:
                os.kill(os.getpid(), number)
                yield
            finally:
                os.kill(os.getpid(), number)  # as a terminal's comes again, with that of `timeout`
                life.append("end")

        monkeypatch.setattr(local, "running", starting)
        with pytest.raises(KeyboardInterrupt):
            local.serve_forever(Settings.load(checkpoint=checkpoint))
        assert life == ["start", "end"]

    def test_it_ends_when_ray_has_died(
        self, life: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive = iter([True, True, False])
        monkeypatch.setattr(local, "lives", lambda: next(alive))
        monkeypatch.setattr(local, "LOOK_S", 0.0)
        with pytest.raises(StartError, match="Ray's own processes were ended"):
            local.serve_forever(Settings.load(checkpoint=checkpoint))
        assert life == ["start"]

    def test_nohup_is_obeyed(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with local.StopSignals() as signals:
                signals.expect()
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)


def test_whatever_is_raised_at_the_start_is_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Ray said this,\nand more.\nAnd more.")

    monkeypatch.setattr(local, "start_ray", fail)
    settings = Settings.load(checkpoint=checkpoint, port=free_port())
    with pytest.raises(StartError, match=r"^RuntimeError: Ray said this,$"):
        local.serve_forever(settings)


def test_two_starts_at_once_do_not_share_the_port(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.load(checkpoint=checkpoint, port=free_port())

    def start_the_other(*_: object) -> None:
        with bound(settings.host, settings.port, shared=True) as gateway:
            gateway.listen()
        with local.running(settings):
            pass

    monkeypatch.setattr(local, "start_ray", start_the_other)
    with pytest.raises(StartError, match="can't listen on"), local.running(settings):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_an_interruption_while_gateways_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the waiting, and leaves no thread that waits on: the process would wait for it."""

    class Gateways:
        def broadcast(self, method: str) -> Gateways:
            assert method == "drain"
            return self

        async def results_async(self, timeout_s: float) -> list[None]:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
            await asyncio.sleep(timeout_s)
            return []

    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: Gateways())
    before = threading.enumerate()
    with local.StopSignals(), pytest.raises(KeyboardInterrupt):
        local.drain(60.0)
    assert threading.enumerate() == before


def test_an_interrupted_start_leaves_no_process(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[subprocess.Popen[bytes]] = []

    def interrupted(processes: int, gpus: int, folder: Path) -> None:
        left.append(subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: str(folder)}))
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "start_ray", interrupted)
    settings = Settings.load(checkpoint=checkpoint, port=free_port())
    with pytest.raises(KeyboardInterrupt), local.running(settings):
        pass
    ended = left[0].poll()
    left[0].kill()
    assert ended == -signal.SIGKILL


class TestWhatRayInherits:
    @pytest.fixture
    def inherited(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Of a start in a folder with a module, by a process with relative paths."""
        found: dict[str, Any] = {}

        def init(**options: Any) -> None:
            look = (
                "import json, os, signal, sys; print(json.dumps([sys.path, os.getcwd(), "
                "[int(x) for x in signal.pthread_sigmask(signal.SIG_BLOCK, [])], "
                "os.environ['RAY_TMPDIR']]))"
            )
            command = [sys.executable, "-c", look]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            names = ("path", "folder", "blocked", "mark")
            found.update(zip(names, json.loads(told), strict=True), options=options)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray takes it

        ray = pytest.importorskip("ray")
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: LOOPBACK)
        monkeypatch.setenv("PYTHONPATH", f":src:{tmp_path}")
        monkeypatch.setenv("RAY_TMPDIR", "before")
        monkeypatch.chdir(tmp_path)
        run = tmp_path / "run"
        run.mkdir()
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        start_ray(3, 0, run)
        found["handled"] = signal.signal(signal.SIGTERM, before) is not signal.SIG_DFL
        assert Path.cwd() == tmp_path
        assert os.environ["RAY_TMPDIR"] == "before"
        return found

    def test_nothing_of_the_current_folder(self, inherited: dict[str, Any], tmp_path: Path) -> None:
        assert inherited["folder"] == str(tmp_path / "run")
        assert inherited["path"][1:3] == [str(tmp_path / "src"), str(tmp_path)]

    def test_signals_stay_handled(self, inherited: dict[str, Any]) -> None:
        assert inherited["handled"]

    def test_its_mark_and_no_hangup(self, inherited: dict[str, Any], tmp_path: Path) -> None:
        assert inherited["mark"] == str(tmp_path / "run")
        assert signal.SIGHUP in inherited["blocked"]
        assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def test_a_private_session_and_no_folded_lines(
        self, inherited: dict[str, Any], tmp_path: Path
    ) -> None:
        options = inherited["options"]
        assert options["_temp_dir"] == str(tmp_path / "run" / "ray")
        assert options["log_to_driver"] is False


def test_ray_that_others_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    with pytest.raises(StartError, match=r"Ray listens on 10\.0\.0\.7"):
        start_ray(3, 0, tmp_path)


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize(
    "late", ["The current node timed out during startup. This", "Timed out waiting for file /x"]
)
def test_ray_that_is_late_is_started_once_more(
    late: str, failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def init(**_: object) -> None:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]))
        if len(started) <= failures:
            raise RuntimeError(late)

    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: LOOPBACK)
    try:
        if failures == 2:
            with pytest.raises(StartError, match="not ready within its 30 s, twice"):
                start_ray(3, 0, tmp_path)
        else:
            start_ray(3, 0, tmp_path)
        assert len(started) == 2
        assert started[0].wait() == -signal.SIGKILL  # what the first left
    finally:
        for each in started:
            each.kill()


# What Serve says of a deployment whose constructor raised, with fewer of the frames.
FAILED = """\
The deployment failed to start 1 times in a row. This may be due to a problem with its constructor \
or initial health check failing. See controller logs for details. Error:
\x1b[36mray::ServeReplica:a:Gateway.initialize_and_get_metadata()\x1b[39m (pid=9172, ip=127.0.0.2)
  File "ray/serve/_private/replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "ray/serve/_private/replica.py", line 4008, in _call_func_or_gen
    result = callable(*args, **kwargs)
             ^^^^^^^^^^^^^^^^^^^^^^^^^
  File "gma/service/app/deployments.py", line 9, in __init__
"""

CAUSED = f"""\
{FAILED}    {{}}["a"]
    ~~^^^^^
KeyError: 'a'

The above exception was the direct cause of the following exception:

\x1b[36mray::ServeReplica:a:Gateway.initialize_and_get_metadata()\x1b[39m (pid=9249, ip=127.0.0.2)
  File "gma/service/app/deployments.py", line 15, in __init__
"""

# What it says of one whose process ended.
DIED = FAILED.partition("\x1b")[0] + "ActorDiedError()"


class TestReason:
    @pytest.mark.parametrize(
        ("raised", "exception"),
        [
            ("    raise OSError(28, 'full')\nOSError: [Errno 28] full", "OSError: [Errno 28] full"),
            ("    assert 1 == 2\n           ^^^^^^\nAssertionError", "AssertionError"),
            ("    f(x)\nValueError: this\nand: that\n\nRuntimeError: not it", "ValueError: this"),
            ("    f(x)\na.Invalid: 1 error\nlabels\n  Field required", "a.Invalid: 1 error"),
            ("a.b.Error: its source is not at hand", "a.b.Error: its source is not at hand"),
            ("", 'File "gma/service/app/deployments.py", line 9, in __init__'),
        ],
    )
    def test_is_the_first_line_of_what_was_raised(self, raised: str, exception: str) -> None:
        assert last_exception(FAILED + raised) == exception

    def test_is_the_last_exception_of_several(self) -> None:
        raised = "    raise RuntimeError('x') from error\nRuntimeError: x\n"
        assert last_exception(CAUSED + raised) == "RuntimeError: x"

    def test_of_a_process_that_ended_is_what_its_caller_got(self) -> None:
        assert last_exception(DIED) == "ActorDiedError()"

    def failed(self, **messages: str) -> Any:
        """An application as Serve tells of it. A deployment whose message is empty is well."""
        deployments = {
            name: SimpleNamespace(message=text, status="DEPLOY_FAILED" if text else "HEALTHY")
            for name, text in messages.items()
        }
        message = f"Failed to update\nthe deployments {list(deployments)}."
        return SimpleNamespace(deployments=deployments, message=message)

    def test_names_the_deployment(self) -> None:
        application = self.failed(Gateway="", Worker=FAILED + "KeyError: 'a'")
        assert reason(application) == "the deployment Worker failed: KeyError: 'a'"

    def test_is_a_start_error_if_there_is_one(self) -> None:
        ours = FAILED + "gma.service.app.start.StartError: a port is taken"
        application = self.failed(Gateway=DIED, Worker=ours)
        assert reason(application) == "a port is taken"

    def test_is_what_serve_says_if_no_deployment_tells_more(self) -> None:
        application = self.failed(Gateway="")
        assert reason(application) == "Failed to update the deployments ['Gateway']."
