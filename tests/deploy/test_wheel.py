"""The wheel: all of it lies under one name, and nothing else is needed to classify a text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("export", "loadtest", "model", "service")
AGREEMENT = ROOT / "docs" / "examples" / "agreement.txt"

CLASSIFY = """\
import json, sys
from importlib.util import find_spec
from pathlib import Path

import gma
from gma import Classifier

answer = Classifier.load("contracts").classify(Path(sys.argv[1]).read_text())
ours = [name for name in ("benchmarks", "tests") if find_spec(name)]
print(json.dumps({"labels": answer.labels, "file": gma.__file__, "ours": ours}))
"""


def build(
    source: Path, kind: str, folder: Path, environment: Mapping[str, str] | None = None
) -> Path:
    """Build a `wheel` or an `sdist` of a source tree."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=environment)
    (built,) = folder.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel by name."""
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    """What gma/ links to has become its own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "gma", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {
        f"gma/{line.removeprefix('gma/')}": (ROOT / line).read_bytes()
        for line in listed.stdout.splitlines()
        if (ROOT / line).is_file()  # the links are folders
    }
    found = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    kernels = Path("model/ops/cpu/libgma_cpu.so")
    assert found.pop(f"gma/{kernels}") == (ROOT / kernels).read_bytes()
    assert found == expected
    for name in "base", "books", "contracts":
        assert f"gma/model/checkpoints/{name}/model.safetensors" in found


def test_it_is_for_this_kind_of_machine(wheel: Path) -> None:
    """It has compiled kernels, for any version of Python."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")


@pytest.mark.parametrize("compiler", [None, "false", "true -O1"])
def test_without_a_compiler_it_has_no_kernels(tmp_path: Path, compiler: str | None) -> None:
    """Or with one that can't. It is for any machine then, and reads all the same: see
    tests/model/test_cpu.py."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "gma", source / "gma", ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    # Nothing but Python is found.
    found = {"PATH": str(tmp_path)} if compiler is None else {"PATH": "/bin", "CXX": compiler}
    environment = found | {"PYTHONDONTWRITEBYTECODE": "1"}
    built = build(source, "wheel", tmp_path / "wheel", environment)
    assert built.name.endswith("-py3-none-any.whl")
    assert not [name for name in contents(built) if name.endswith(".so")]


@pytest.mark.long
def test_the_source_distribution_makes_the_same(wheel: Path, tmp_path: Path) -> None:
    packed = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(packed) as opened:
        # Python has it since 3.11.4.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        opened.extractall(tmp_path / "source", **safe)  # type: ignore[arg-type]  # noqa: S202 (ours)
    (source,) = (tmp_path / "source").iterdir()
    assert contents(build(source, "wheel", tmp_path / "wheel")) == contents(wheel)


class Installed(NamedTuple):
    """An environment that the wheel was installed into, and what its processes see."""

    bin: Path
    packages: Path
    here: Path  # the working directory
    environment: dict[str, str]

    def run(self, *command: str | Path) -> str:
        ran = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.here,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """In an empty environment, beside packages that have our folders' names.

    Third parties' packages are this environment's: there is no network.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--isolated", "install"]
    subprocess.run([*pip, "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    here = folder / "here"
    for name in PACKAGES:
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text(f"raise ImportError('this {name} is not gma')\n")
    shutil.copy(AGREEMENT, here / "text.txt")
    environment = {
        "PATH": str(python.parent),
        "PYTHONPATH": str(here),  # before all that is installed
        "OMP_NUM_THREADS": "1",
    }
    return Installed(python.parent, packages, here, environment)


def test_only_gma_is_installed(installed: Installed) -> None:
    entries = {entry.name for entry in installed.packages.iterdir()} - {"others.pth"}
    assert entries == {"gma", "gma_service-0.1.0.dist-info"}
    assert not [file for file in installed.packages.rglob("*") if file.is_symlink()]


def test_the_command_and_the_package_give_one_answer(installed: Installed) -> None:
    told = json.loads(installed.run("gma", "classify", "--json", "text.txt"))
    found = json.loads(installed.run("python", "-c", CLASSIFY, "text.txt"))
    assert "anti_assignment" in told["labels"]
    assert found["labels"] == told["labels"]
    assert Path(found["file"]).is_relative_to(installed.packages)
    assert found["ours"] == [], "the checkout is in the way"
