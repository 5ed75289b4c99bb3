"""The rules that keep the parts apart, read off the source.

An import counts wherever it stands: in a function, or where only the type checker goes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# Where the modules of each package lie.
FOLDERS = {
    "gma.drawing": "gma/drawing",
    "gma.model": "model",
    "gma.export": "export",
    "gma.service": "service",
    "gma.loadtest": "loadtest",
    "benchmarks": "benchmarks",
    "deploy": "deploy",
    "docs.examples": "docs/examples",
    "tests": "tests",
}
OWN = ("gma.drawing", "gma.model", "gma.export", "gma.service", "gma.loadtest")

# What a package may import beside itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "gma": ("gma.model", "gma.service"),
    "gma.drawing": (),
    "gma.model": ("gma.drawing",),
    "gma.export": ("gma.model",),
    "gma.service": ("gma.model", "gma.export"),
    "gma.loadtest": ("gma.drawing",),
    "benchmarks": ("gma", *OWN),
    "deploy": ("gma", *OWN),
    "docs.examples": ("gma", *OWN),
    "tests": ("gma", *OWN, "benchmarks", "deploy"),
}

# What only these may import, whatever else holds.
ONLY_FROM = {
    "gma.loadtest": ("gma.loadtest", "gma.service.cli", "benchmarks", "tests"),
    "gma.model.training": (
        "gma.model.training",
        "gma.service.batch",
        "gma.service.cli",
        "benchmarks",
        "tests",
    ),
}

# The parts of a package, from above: a part may import itself and what stands below it.
ORDER: dict[str, tuple[set[str], ...]] = {
    "gma.service": (
        {"cli"},
        {"app", "batch", "client"},
        {"http", "python", "worker"},
        {"meter"},
        {"gateway", "runners"},
        {"sessions"},
        {"link"},
        {"engine"},
        {"observe"},
        {"model_folder", "cores", "heap"},
        {"settings", "errors", "tasks", "watched", "odds"},
    ),
    "gma.model": (
        {"training"},
        {"reader", "hub"},
        {"reading"},
        {"weights", "fused"},
        {"classifier"},
        {"backbone"},
        {"cpu"},
        {"layers"},
        {"mixers", "products"},
        {"state", "tokenizer", "grid"},
        {"ops", "scores", "merges", "words"},
        {"config"},
    ),
}

# What a part, and whatever of ours it imports, may not import.
WEB = {"fastapi", "starlette", "uvicorn"}
IGNORANT_OF = {
    "gma.model": {"ray", "prometheus_client", "onnx", "onnxruntime", *WEB},
    "gma.export": {"ray", "prometheus_client", *WEB},
    "gma.service.engine": {"torch", "ray", "tiktoken", "tokenizers", "gma.service.http", *WEB},
    "gma.service.engine.scheduler": {"numpy", "asyncio"},
    "gma.service.link": {"torch", "ray", *WEB},
    "gma.service.gateway": {"torch", "ray", *WEB},
    "gma.service.http": {"torch", "ray"},
    "gma.service.client": {"torch", "ray", "gma.service.http", *WEB},
}
EXCEPT = {("gma.service.link.replicas", "ray")}  # it asks Serve which workers there are


class Import(NamedTuple):
    """`from module import name as here`, or `import module` without a name."""

    module: str
    name: str | None
    here: str  # what the importer calls it


class Module:
    """A source file: its imports, and the strings and attributes in it."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        self.nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        self.imports = list(self._imports())

    def _imports(self) -> Iterator[Import]:
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, None, alias.asname or alias.name)
            elif isinstance(node, ast.ImportFrom):
                above = self.package.split(".")
                above = above[: len(above) - node.level + 1] if node.level else []
                module = ".".join([*above, *filter(None, [node.module])])
                for alias in node.names:
                    yield Import(module, alias.name, alias.asname or alias.name)


class Code:
    """All modules of a checkout by name, and which modules each imports."""

    def __init__(self, root: Path) -> None:
        self.modules = {"gma": Module("gma", root / "gma/__init__.py")}
        for package, folder in FOLDERS.items():
            for file in sorted((root / folder).rglob("*.py")):
                path = file.relative_to(root / folder).with_suffix("")
                name = ".".join([package, *path.parts]).removesuffix(".__init__")
                self.modules[name] = Module(name, file)
        self.imports = {
            name: {self.imported(each) for each in module.imports}
            for name, module in self.modules.items()
        }

    def imported(self, each: Import) -> str:
        """The module that an import reads: `from a import b` is a.b where that is a module."""
        inner = f"{each.module}.{each.name}"
        return inner if inner in self.modules else each.module

    def under(self, package: str) -> list[str]:
        return [name for name in self.modules if is_under(name, package)]

    def reached(self, module: str) -> dict[str, str]:
        """All that importing a module imports, through ours only: imported -> by whom.

        The packages that a module lies in are imported with it. `gma` itself is left out: it
        imports what it offers when that is asked for.
        """
        reached: dict[str, str] = {}
        ahead = [module]
        while ahead:
            importer = ahead.pop()
            for name in sorted(self.imports.get(importer, set())):
                inside = [each for each in parents(name) if each in self.modules and each != "gma"]
                for each in {name, *inside} - reached.keys():
                    reached[each] = importer
                    ahead.append(each)
        return reached


def parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def package_of(name: str) -> str | None:
    """The package of ours that a module belongs to, None for others' modules."""
    return next((each for each in reversed(MAY_IMPORT) if is_under(name, each)), None)


def wrong_way(code: Code) -> list[str]:
    """Imports between packages that point up, and those of what only some may import."""
    return [
        f"{module} imports {name}"
        for module, imports in code.imports.items()
        for name in sorted(imports)
        if not _may_import(module, name)
    ]


def _may_import(module: str, name: str) -> bool:
    for package, importers in ONLY_FROM.items():
        if is_under(name, package):
            return any(is_under(module, each) for each in importers)
    own, other = package_of(module), package_of(name)
    return other is None or own == other or (own is not None and other in MAY_IMPORT[own])


def out_of_order(code: Code, package: str) -> list[str]:
    """Imports within a package of a part that stands above or beside; modules of no part."""
    level = {f"{package}.{part}": n for n, parts in enumerate(ORDER[package]) for part in parts}
    found = []
    for module in code.under(package):
        part = _part(module, package)
        if module != package and part not in level:
            found.append(f"{module} has no place in the order")
            continue
        for name in sorted(code.imports[module]):
            other = _part(name, package)
            if part in level and other in level and other != part and level[other] <= level[part]:
                found.append(f"{module} imports {name}")
    return found


def _part(module: str, package: str) -> str:
    return ".".join(module.split(".")[: package.count(".") + 2])


def circles(code: Code) -> list[str]:
    """Modules that import each other, directly or through others."""
    ours = {name: imports & code.modules.keys() for name, imports in code.imports.items()}

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        ahead = [module]
        while ahead:
            new = ours[ahead.pop()] - found
            found |= new
            ahead += new
        return found

    everything = {name: reached(name) for name in ours}
    found = {
        frozenset(other for other in everything[name] if name in everything[other])
        for name in ours
        if name in everything[name]
    }
    return sorted(", ".join(sorted(circle)) for circle in found)


def private(code: Code) -> list[str]:
    """Names with an underscore that a module takes from another module of ours."""
    found = {
        f"{module.name} uses {other}.{name}"
        for module in code.modules.values()
        for other, name in _taken(code, module)
        if other != module.name and _is_private(name)
    }
    return sorted(found)


def _taken(code: Code, module: Module) -> Iterator[tuple[str, str]]:
    """All that is said to be of a module of ours: (module, name)."""
    modules: dict[str, str] = {}  # by what they are called here
    for each in module.imports:
        name = code.imported(each)
        if name not in code.modules:
            continue
        if each.name is None or name != each.module:
            modules[each.here] = name
        if each.name is not None:
            yield each.module, each.name
        for above in parents(name):  # a module may itself be private
            yield above, name.removeprefix(f"{above}.").partition(".")[0]
    for node in module.nodes:
        match node:
            case ast.Attribute(value=value, attr=name) if _dotted(value) in modules:
                yield modules[_dotted(value)], name
            # Such as monkeypatch.setattr(module, "_name", ...).
            case ast.Call(args=[value, ast.Constant(value=str(name)), *_]) if (
                _dotted(value) in modules
            ):
                yield modules[_dotted(value)], name
            case ast.Constant(value=str(text)) if text.rpartition(".")[0] in code.modules:
                yield text.rpartition(".")[0], text.rpartition(".")[2]


def _dotted(node: ast.expr) -> str:
    """`a.b.c` as it is written; empty for another expression."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name) if inner := _dotted(value):
            return f"{inner}.{name}"
    return ""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def short_names(code: Code) -> list[str]:
    """Imports, and names of modules in strings, that leave out `gma`."""
    folder = "|".join(each.removeprefix("gma.") for each in OWN)
    found = []
    for module in code.modules.values():
        names = {each.module for each in module.imports if re.match(rf"({folder})\b", each.module)}
        for node in module.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said = re.findall(rf"(?<![\w./-])(?:{folder})(?:\.\w+)+", node.value)
                names |= {x for x in said if ".".join(["gma", *x.split(".")[:2]]) in code.modules}
        found += [f"{module.name} says {name}" for name in sorted(names)]
    return found


def forbidden(code: Code, part: str) -> list[str]:
    """What a part reaches and may know nothing of."""
    return [
        f"{module} imports {name} ({importer})"
        for module in code.under(part)
        for name, importer in code.reached(module).items()
        for each in sorted(IGNORANT_OF[part])
        if is_under(name, each) and (module, each) not in EXCEPT
    ]


@pytest.fixture(scope="module")
def code() -> Code:
    return Code(ROOT)


def none_of(found: list[str]) -> None:
    assert not found, "\n".join(["", *found])


def test_imports_flow_one_way(code: Code) -> None:
    none_of(wrong_way(code))


@pytest.mark.parametrize("package", ORDER)
def test_parts_stand_in_an_order(code: Code, package: str) -> None:
    for part in set[str]().union(*ORDER[package]):
        assert code.under(f"{package}.{part}"), f"{part} is gone: mend the rule"
    none_of(out_of_order(code, package))


def test_no_modules_import_each_other(code: Code) -> None:
    none_of(circles(code))


def test_what_is_private_stays_in_its_module(code: Code) -> None:
    none_of(private(code))


def test_modules_are_called_by_their_whole_names(code: Code) -> None:
    none_of(short_names(code))


@pytest.mark.parametrize("part", IGNORANT_OF)
def test_parts_are_ignorant_of(code: Code, part: str) -> None:
    assert code.under(part), f"{part} is gone: mend the rule"
    none_of(forbidden(code, part))


class TestTheRulesThemselves:
    """Each sees what it is there for, in a small tree that is made up."""

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        for folder in ("gma", *FOLDERS.values()):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "__init__.py").touch()
        return tmp_path

    def code(self, tree: Path, sources: dict[str, str]) -> Code:
        """The tree with these files."""
        for name, source in sources.items():
            file = tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return Code(tree)

    @pytest.mark.parametrize(
        ("file", "source"),
        [
            ("model/a.py", "import gma.service.engine"),
            ("model/a.py", "def late():\n    from gma.service import engine"),
            ("export/a.py", "from gma.service import engine"),
            ("model/a.py", "def late():\n    from gma.export.artifact import export"),
            ("model/a.py", "from ..export import artifact"),
            ("service/a.py", "from gma.loadtest.command import loadtest"),
            ("export/a.py", "from gma.model.training.train import train"),
            ("model/a.py", "from gma.model import training\nimport gma.model.training"),
            ("loadtest/a.py", "from gma.model.config import ModelConfig"),
            ("loadtest/b.py", "from gma import load"),
            ("service/a.py", "import gma"),
            ("model/a.py", "import benchmarks.timing"),
            ("service/a.py", "from tests import service"),
            ("benchmarks/a.py", "from tests.service.asgi import TEXT"),
            ("deploy/a.py", "import benchmarks"),
        ],
    )
    def test_an_import_the_wrong_way(self, tree: Path, file: str, source: str) -> None:
        code = self.code(tree, {"model/training/train.py": "", file: source})
        assert len(wrong_way(code)) == 1

    def test_the_right_way(self, tree: Path) -> None:
        code = self.code(
            tree,
            {
                "gma/__init__.py": "from gma.model.classifier import Classifier",
                "model/classifier.py": "import torch\nfrom . import config",
                "model/config.py": "",
                "export/a.py": "import gma.model.config",
                "service/cli/main.py": "import gma.loadtest.command, gma.model.training",
                "benchmarks/a.py": "from gma import load\nfrom gma.service.engine import engine",
                "tests/a.py": "import benchmarks.a, deploy.b, gma.loadtest, gma.model.training",
            },
        )
        assert wrong_way(code) == []

    @pytest.mark.parametrize(
        ("file", "source"),
        [
            ("service/gateway/a.py", "from gma.service.http.body import guarded"),
            ("service/runners/a.py", "from gma.service.gateway import contract"),
            ("service/engine/a.py", "from ..link import client"),
            ("service/observe/a.py", "import gma.service.engine.step"),
            ("service/errors.py", "import gma.service.settings"),
            ("model/ops/choice.py", "from gma.model.state import State"),
            ("service/loose.py", ""),
        ],
    )
    def test_parts_out_of_order(self, tree: Path, file: str, source: str) -> None:
        package = f"gma.{file.partition('/')[0]}"
        assert len(out_of_order(self.code(tree, {file: source}), package)) == 1

    def test_parts_in_order(self, tree: Path) -> None:
        code = self.code(
            tree,
            {
                "service/worker.py": "from .runners import torch\nimport gma.model.weights",
                "service/http/app.py": "from . import keys\nimport gma.service.gateway.a",
                "service/gateway/a.py": "from gma.service.link.client import Tokens",
                "model/fused.py": "from gma.model.classifier import Classifier",
            },
        )
        assert out_of_order(code, "gma.service") == out_of_order(code, "gma.model") == []

    def test_a_circle(self, tree: Path) -> None:
        code = self.code(
            tree,
            {
                "model/a.py": "from gma.model import b",
                "model/b.py": "def late():\n    from gma.model.c import x",
                "model/c.py": "if TYPE_CHECKING:\n    import gma.model.a",
                "model/d.py": "import gma.model.a",
                "tests/a.py": "from . import b",
                "tests/b.py": "from tests.a import x",
            },
        )
        assert circles(code) == ["gma.model.a, gma.model.b, gma.model.c", "tests.a, tests.b"]

    def test_a_package_that_offers_its_modules_is_no_circle(self, tree: Path) -> None:
        code = self.code(
            tree,
            {
                "model/__init__.py": "from gma.model import a",
                "model/a.py": "from . import b",
                "model/b.py": "",
            },
        )
        assert circles(code) == []

    @pytest.mark.parametrize(
        "source",
        [
            "from gma.model.a import _x",
            "from gma.model._hidden import x",
            "from gma.model import a\na._x()",
            "import gma.model.a as b\nb._x",
            "import gma.model.a\ngma.model.a._x",
            "from gma.model import a\nmonkeypatch.setattr(a, '_x', 1)",
            "monkeypatch.setattr('gma.model.a._x', 1)",
        ],
    )
    def test_private_names(self, tree: Path, source: str) -> None:
        code = self.code(
            tree, {"model/a.py": "_x = 1", "model/_hidden.py": "x = 1", "tests/a.py": source}
        )
        assert len(private(code)) == 1

    def test_names_that_anybody_may_use(self, tree: Path) -> None:
        source = "from gma.model import a\nimport torch\na.x._replace()\ntorch._C\na.__doc__\na.x"
        code = self.code(
            tree, {"model/a.py": "from __future__ import annotations", "tests/a.py": source}
        )
        assert private(code) == []

    @pytest.mark.parametrize(
        "source",
        [
            "import model.made",
            "from service.made import step",
            "import loadtest",
            "command = ['python', '-m', 'model.made']",
            "monkeypatch.setattr('model.made.LIMIT', 1)",
            "'''See `model.made`.'''",
        ],
    )
    def test_short_names(self, tree: Path, source: str) -> None:
        code = self.code(tree, {"model/made.py": "", "tests/a.py": source})
        assert len(short_names(code)) == 1

    def test_whole_names_and_files(self, tree: Path) -> None:
        source = "import gma.model.made\nx = 'gma.model.made', 'model.safetensors'\nexport.x"
        assert short_names(self.code(tree, {"model/made.py": "", "tests/a.py": source})) == []

    def test_what_is_reached_through_ours(self, tree: Path) -> None:
        code = self.code(
            tree,
            {
                "service/engine/scheduler.py": "from . import order",
                "service/engine/order.py": "if 1:\n    import numpy.linalg",
            },
        )
        assert forbidden(code, "gma.service.engine.scheduler") == [
            "gma.service.engine.scheduler imports numpy.linalg (gma.service.engine.order)"
        ]

    def test_what_a_package_itself_imports(self, tree: Path) -> None:
        code = self.code(
            tree,
            {
                "model/config.py": "",
                "model/__init__.py": "import torch",
                "service/gateway/a.py": "import gma.model.config",
            },
        )
        assert len(forbidden(code, "gma.service.gateway")) == 1

    def test_one_module_may_know_ray(self, tree: Path) -> None:
        code = self.code(
            tree,
            {
                "service/link/replicas.py": "import ray",
                "service/link/remote.py": "from . import replicas",
            },
        )
        assert forbidden(code, "gma.service.link") == [
            "gma.service.link.remote imports ray (gma.service.link.replicas)"
        ]
