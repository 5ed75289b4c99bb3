"""The rules that keep the parts apart, read off the imports in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each package may import itself and those that follow.
LAYERS = ("gma.service", "gma.export", "gma.model")
OURS = {*LAYERS, "gma.loadtest"}

# What a module, and whatever of ours it imports, may not import.
IGNORANT_OF = {
    "gma.model": {
        "ray",
        "fastapi",
        "starlette",
        "uvicorn",
        "prometheus_client",
        "onnx",
        "onnxruntime",
    },
    "gma.export": {"ray", "fastapi", "starlette", "uvicorn", "prometheus_client"},
    "gma.service.engine.scheduler": {"torch", "numpy", "asyncio", "ray"},
    "gma.service.engine.engine": {"ray", "fastapi", "starlette", "uvicorn", "tokenizers"},
    "gma.service.gateway.gateway": {"torch"},
    "gma.service.link.remote": {"torch", "ray", "fastapi", "starlette", "uvicorn"},
    "gma.service.link.replicas": {"torch"},
}


class Code:
    """The modules under a folder, and what each imports anywhere in its file."""

    def __init__(self, root: Path) -> None:
        files = [file for name in OURS for file in (root / name.removeprefix("gma.")).rglob("*.py")]
        names = {f"gma.{_module(file.relative_to(root))}": file for file in files}
        self.imports = {name: set(_imports(file, name)) for name, file in names.items()}

    def modules(self, package: str) -> list[str]:
        return sorted(name for name in self.imports if _is_under(name, package))

    def reached(self, module: str) -> dict[str, str]:
        """Everything that importing the module imports, through ours only: imported -> by whom."""
        reached: dict[str, str] = {}
        ahead = [module]
        while ahead:
            importer = ahead.pop()
            for name in self.imports.get(importer, set()) - reached.keys():
                reached[name] = importer
                ahead.append(name)
        return reached


def _module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _imports(file: Path, module: str) -> Iterator[str]:
    """All names that may be modules: `from a.b import c` is a.b and a.b.c."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(parents if node.level else []), *([node.module] if node.module else [])]
            )
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def wrong_way(code: Code) -> list[str]:
    """Imports of ours that point up, or out of the load test. Only the command may import that."""
    allowed = {package: set(LAYERS[index:]) for index, package in enumerate(LAYERS)}
    allowed["gma.loadtest"] = {"gma.loadtest"}
    return [
        f"{module} imports {name}"
        for package in sorted(OURS)
        for module in code.modules(package)
        for name in sorted(code.imports[module])
        if ".".join(name.split(".")[:2]) in OURS - allowed[package]
        and not (module == "gma.service.cli.main" and _is_under(name, "gma.loadtest"))
    ]


def forbidden(code: Code, part: str) -> list[str]:
    return [
        f"{module} imports {name} ({importer})"
        for module in code.modules(part)
        for name, importer in sorted(code.reached(module).items())
        if name.partition(".")[0] in IGNORANT_OF[part]
    ]


@pytest.fixture(scope="module")
def code() -> Code:
    return Code(ROOT)


def test_imports_flow_one_way(code: Code) -> None:
    assert not wrong_way(code)


@pytest.mark.parametrize("part", IGNORANT_OF)
def test_parts_are_ignorant_of(code: Code, part: str) -> None:
    assert code.modules(part), f"{part} is gone: mend the rule"
    assert not forbidden(code, part)


class TestTheRulesThemselves:
    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        for package in ("model", "export", "service", "loadtest"):
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").touch()
        for wing in ("cli", "engine"):
            (tmp_path / "service" / wing).mkdir()
        return tmp_path

    @pytest.mark.parametrize(
        ("file", "source"),
        [
            ("model/a.py", "import gma.service.engine"),
            ("model/a.py", "def late():\n    from gma.service import engine"),
            ("export/a.py", "from gma.service import engine"),
            ("model/a.py", "def late():\n    from gma.export.artifact import export"),
            ("service/a.py", "from gma.loadtest.command import loadtest"),
            ("loadtest/a.py", "from gma.model.config import ModelConfig"),
            ("loadtest/__init__.py", "from gma.model import config"),
        ],
    )
    def test_sees_an_import_the_wrong_way(self, tree: Path, file: str, source: str) -> None:
        (tree / file).write_text(source)
        assert len(wrong_way(Code(tree))) >= 1

    def test_allows_the_right_way(self, tree: Path) -> None:
        (tree / "service/a.py").write_text(
            "import gma.model.config\nfrom . import b\nfrom .b import c"
        )
        (tree / "service/b.py").write_text("from gma.export.artifact import Artifact")
        (tree / "export/a.py").write_text("import gma.model.config")
        (tree / "service/cli/main.py").write_text("from gma.loadtest.command import loadtest")
        assert not wrong_way(Code(tree))

    def test_follows_imports_of_ours(self, tree: Path) -> None:
        (tree / "service/engine/scheduler.py").write_text("from . import order")
        (tree / "service/engine/order.py").write_text("if 1:\n    import torch.nn")
        assert forbidden(Code(tree), "gma.service.engine.scheduler") == [
            "gma.service.engine.scheduler imports torch.nn (gma.service.engine.order)"
        ]
