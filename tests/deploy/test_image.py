"""The Dockerfile: what it promises is read off it, and its commands are run without Docker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Dockerfile
from tests.service.asgi import save_checkpoint
from tests.service.running import free_port

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
TARGETS = ("cpu", "gpu")

# What a compiler's package, command or stage is called.
COMPILER = re.compile(r"\b(g\+\+|gcc|clang|build-essential|nvcc|cmake|\S+-dev(el)?)\b|g\+\+")


def is_pinned(image: str) -> bool:
    """Whether a digest names it, or a version to the patch and the system below."""
    return bool(re.fullmatch(r"\S+@sha256:[0-9a-f]{64}|\S+:\d+\.\d+\.\d+-\S+", image))


def problems(dockerfile: Dockerfile, target: str) -> list[str]:
    """What a target must be and is not."""
    found = [f"{image} is not pinned" for image in dockerfile.external if not is_pinned(image)]
    user = dockerfile.last(target, "USER")
    if user is None or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text):
        found.append("it runs as root, or as a name that Kubernetes can't check")
    ran = [each.text for each in dockerfile.lineage(target) if each.name == "RUN"]
    found += [f"it has a compiler: {line}" for line in ran if COMPILER.search(line)]
    copied = [each.text for each in dockerfile.lineage(target) if each.name in ("COPY", "ADD")]
    found += [f"it takes files of this machine: {x}" for x in copied if "--from=" not in x]
    if not any("-build /opt/gma /opt/gma" in line for line in copied):
        found.append("it has nothing installed")
    check = dockerfile.last(target, "HEALTHCHECK")
    if check is None or "CMD [" not in check.text:
        found.append("it has no health check, or one that needs a shell")
    labels = " ".join(x.text for x in dockerfile.lineage(target) if x.name == "LABEL")
    found += [
        f"it has no label {name}"
        for name in ("title", "description", "licenses", "version", "revision")
        if f"org.opencontainers.image.{name}=" not in labels
    ]
    if dockerfile.environment(target).get("HOME") != "/tmp":  # noqa: S108
        found.append("its home is not among what can be written")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_targets_are_what_they_promise(target: str) -> None:
    assert not problems(Dockerfile(TEXT), target)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("python:3.11.14-slim-trixie", "python:3-slim", "is not pinned"),
        ("python:3.11.14-slim-trixie", "python", "is not pinned"),
        ("USER 10001:10001", "", "runs as root"),
        ("USER 10001:10001", "USER 0:0", "runs as root"),
        ("USER 10001:10001", "USER gma", "runs as root"),
        ("FROM service AS cpu", "FROM cpu-build AS cpu", "has a compiler"),
        ("FROM service AS cpu", "FROM service AS cpu\nRUN apt-get install gcc", "has a compiler"),
        ("FROM service AS cpu", "FROM service AS cpu\nCOPY . .", "files of this machine"),
        ("COPY --from=cpu-build /opt/gma /opt/gma", "", "nothing installed"),
        ("HEALTHCHECK", "EXPOSE", "no health check"),
        ('CMD ["python", "-c"', "CMD curl [", "no health check"),
        ("image.revision", "image.r", "no label revision"),
        ("HOME=/tmp", "HOME=/root", "its home"),
    ],
)
def test_a_mistake_is_caught(before: str, after: str, message: str) -> None:
    assert before in TEXT
    found = problems(Dockerfile(TEXT.replace(before, after)), "cpu")
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize("text", ["RUN true", "FROM python", "FROM a AS b\nrun true"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"FROM|instruction"):
        Dockerfile(text)


def test_both_targets_have_the_operators_and_the_gpu_its_kernels() -> None:
    dockerfile = Dockerfile(TEXT)
    for target, cuda in zip(TARGETS, ("OFF", "ON"), strict=True):
        (line,) = (x.text for x in dockerfile.lineage(f"{target}-build") if "export/ops" in x.text)
        assert f"GMA_CUDA={cuda}" in line
    copied = [x.text for x in dockerfile.stages["gpu"].instructions if x.name == "COPY"]
    folder = dockerfile.environment("gpu")["GMA_COMPILE_CACHE"]
    assert f"--from=kernels manifest.json {folder}/manifest.json" in copied
    assert f"--from=kernels kernels {folder}/kernels" in copied


def test_an_edit_installs_nothing_of_others_anew() -> None:
    """What comes after the source is made without an index, but for the operators' own build."""
    for target in TARGETS:
        lineage = Dockerfile(TEXT).lineage(f"{target}-build")
        copies = [n for n, each in enumerate(lineage) if each.name == "COPY"]
        assert lineage[copies[-1]].text == ". ."
        assert "requirements.lock" in lineage[copies[0]].text
        after = [each.text for each in lineage[copies[-1] :] if each.name == "RUN"]
        assert all("pip install --no-deps " in line for line in after)
        assert not any(re.search(r"gma |model|service", lineage[n].text) for n in copies[:-1])


def included(patterns: list[str]) -> Callable[[str], bool]:
    """A test of whether .dockerignore lets a path into the build: the last that fits decides."""

    def include(path: str) -> bool:
        parts = Path(path).parts
        prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        kept = True
        for pattern in patterns:
            bare = pattern.removeprefix("!").removeprefix("**/")
            anywhere = "**/" in pattern
            if any(fnmatch(part, bare) for part in (parts if anywhere else prefixes)):
                kept = pattern.startswith("!")
        return kept

    return include


@pytest.fixture(scope="module")
def is_included() -> Callable[[str], bool]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return included([line for line in lines if line and not line.startswith("#")])


@pytest.mark.parametrize(
    ("path", "goes"),
    [
        ("gma/model", True),
        ("service/app/deployments.py", True),
        ("model/checkpoints/contracts/model.safetensors", True),
        ("export/ops/CMakeLists.txt", True),
        ("requirements.lock", True),
        ("service/__pycache__/app.pyc", False),
        (".git/config", False),
        (".venv/bin/python", False),
        ("api-keys", False),
        ("deploy/kubernetes/base/rayservice.yaml", False),
        ("tests/conftest.py", False),
    ],
)
def test_only_what_is_installed_goes_into_the_build(
    is_included: Callable[[str], bool], path: str, goes: bool
) -> None:
    assert is_included(path) is goes


class Container:
    """Folders here that stand for the paths of the image."""

    def __init__(self, folder: Path, source: Path) -> None:
        self._folders = {"/opt/gma": folder, "/src": source}
        self.bin = folder / "bin"

    def here(self, command: str) -> str:
        for there, folder in self._folders.items():
            command = command.replace(there, str(folder))
        return re.sub(r"--mount=\S+ *", "", command)


def copy(files: list[str], there: Path) -> None:
    for file in files:
        (there / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, there / file, follow_symlinks=False)


@pytest.fixture(scope="module")
def container(
    tmp_path_factory: pytest.TempPathFactory, is_included: Callable[[str], bool]
) -> Container:
    folder = tmp_path_factory.mktemp("image")
    source = folder / "src"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = list(filter(is_included, listed.stdout.splitlines()))
    container = Container(folder / "gma", source)
    environment = {
        "PATH": f"{container.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    for line in Dockerfile(TEXT).lineage("cpu-build"):
        if line.name == "COPY":
            *names, there = line.text.split()
            assert there in (".", "./")
            copy([file for file in files if names == ["."] or file in names], source)
        if line.name != "RUN" or "apt-get" in line.text or "export/ops" in line.text:
            continue
        subprocess.run(
            ["sh", "-ec", container.here(line.text)], cwd=source, env=environment, check=True
        )
        (packages,) = container.bin.parent.glob("lib/python*/site-packages")
        for old in packages.glob("setuptools*"):  # venv's own would go before the pinned one
            shutil.rmtree(old)
        (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return container


@pytest.fixture(scope="module")
def environment(container: Container) -> dict[str, str]:
    """The variables that the image sets, and those that a user of it would set."""
    dockerfile = Dockerfile(TEXT)
    image = dockerfile.environment("cpu")
    return {**image, "PATH": f"{container.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
class TestCommands:
    """In a clean virtual environment. Third parties' packages are this environment's: there is no
    network; so the operators, whose build needs packages of its own, are left to `make ops`."""

    def test_the_package_is_the_one_that_was_installed(
        self, container: Container, environment: dict[str, str], tmp_path: Path
    ) -> None:
        """With its model: `gma info` reads the checkpoint that comes with it."""
        code = "import gma, gma.model.config as c; print(gma.__file__, c.DEFAULT_CHECKPOINT)"
        ran = subprocess.run(
            ["python", "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        file, checkpoint = ran.stdout.split()
        assert Path(file).is_relative_to(container.bin.parent)
        assert Path(checkpoint, "model.safetensors").is_file()

    @pytest.fixture
    def started(
        self, environment: dict[str, str], tmp_path: Path
    ) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
        dockerfile = Dockerfile(TEXT)
        entry, arguments = (dockerfile.last("cpu", name) for name in ("ENTRYPOINT", "CMD"))
        assert entry
        assert arguments
        settings = {
            "GMA_CHECKPOINT": str(save_checkpoint(tmp_path / "tiny")),
            "GMA_PORT": str(free_port()),
        }
        environment = {**environment, **settings}
        command = [*entry.words, *arguments.words]
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            yield process, environment
            process.kill()

    def test_starts_is_healthy_and_stops(
        self, started: tuple[subprocess.Popen[str], dict[str, str]]
    ) -> None:
        process, environment = started
        assert process.stdout
        assert process.stdout.readline().startswith("Ready at http://0.0.0.0:")
        check = Dockerfile(TEXT).last("cpu", "HEALTHCHECK")
        assert check
        command = check.text[check.text.index("[") :]
        words = type(check)("CMD", command).words
        subprocess.run(words, env=environment, check=True)
        nobody = {**environment, "GMA_PORT": str(free_port())}
        assert subprocess.run(words, env=nobody, stderr=subprocess.DEVNULL).returncode == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
