"""What the commands in docs/deploy.md name is there, and its overlay is right."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from gma.service.app.models_file import models_of
from gma.service.cli import main as cli
from gma.service.settings import Settings, check_names
from tests.deploy import kustomize
from tests.deploy.dockerfile import Dockerfile
from tests.deploy.manifests import Manifest, problems, serve_config, service

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "deploy.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line
]
(MODELS,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
OVERLAY = next(x for x in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "my-gma/" in x)

# Of kubectl, with what they are given; `-n gma` and the like aside.
VERBS = {"apply", "create", "wait", "port-forward", "patch", "describe", "get", "logs"}

# What the operator makes of the RayService, which no file here says.
MADE = {"service/gma-serve-svc"}

# Of another variant.
SINGLE = {"deployment/gma"}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """The manifests that the overlay makes of the variant."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "deploy").symlink_to(ROOT / "deploy")
    (folder / "my-gma").mkdir()
    (folder / "my-gma" / "kustomization.yaml").write_text(OVERLAY)
    return kustomize.build(folder / "my-gma")


def test_the_overlay_is_right(manifests: list[Manifest]) -> None:
    assert problems(manifests) == []
    assert "registry.example.com/gma-service:0.1.0-cpu" in yaml.safe_dump(manifests)
    assert "PodMonitor" in {manifest["kind"] for manifest in manifests}


def test_the_file_of_models_is_right(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(MODELS)
    assert [*models_of(Settings.load(models=file))] == ["contracts", "books"]


def wrong(command: str, manifests: list[Manifest]) -> Iterator[str]:
    """Yield what a command says that is not so."""
    for piece in command.split(" | "):
        program, *words = shlex.split(piece)
        match program:
            case "docker":
                yield from wrong_docker(words)
            case "kubectl":
                yield from wrong_kubectl(words, manifests)
            case "gma":
                yield from wrong_gma(words)
            case "curl":
                yield from wrong_path(words)
            case "mkdir":
                pass
            case _:
                yield f"{program} is not explained"


def wrong_docker(words: list[str]) -> Iterator[str]:
    dockerfile = Dockerfile((ROOT / "Dockerfile").read_text())
    images = {f"gma-service:{target}" for target in dockerfile.stages}
    if not images & set(words):
        yield "there is no such image"
    if words[0] == "build":
        if words[words.index("--target") + 1] not in dockerfile.stages:
            yield "there is no such target"
        if "--build-context" in words:
            name = words[words.index("--build-context") + 1].partition("=")[0]
            copied = [x.text for x in dockerfile.stages["gpu"].instructions if x.name == "COPY"]
            if not any(f"--from={name} " in line for line in copied):
                yield f"no stage takes {name}"
    elif "-v" in words:
        there = words[words.index("-v") + 1].partition(":")[2]
        entry = dockerfile.last("gpu-build", "ENTRYPOINT")
        if not entry or there not in entry.words:
            yield f"nothing reads {there}"


def wrong_kubectl(words: list[str], manifests: list[Manifest]) -> Iterator[str]:
    verb = words[0]
    if verb not in VERBS:
        yield f"kubectl {verb} is not explained"
    names = {f"{m['kind'].lower()}/{m['metadata']['name']}" for m in manifests} | MADE | SINGLE
    literals = [x.partition("=")[2] for x in words if x.startswith("--from-literal=")]
    if literals:
        yield from wrong_literals(words, [each.partition("=")[0] for each in literals])
        return
    text = yaml.safe_dump(manifests)
    for word in re.findall(r"\b(?:rayservice|service|deployment)[/ ][\w-]+", " ".join(words)):
        if word.replace(" ", "/") not in names:
            yield f"there is no {word}"
    if "secret" in words:
        name = words[words.index("generic") + 1]
        file = next(x for x in words if x.startswith("--from-file=")).partition("=")[2]
        arguments = serve_config(service(manifests))["applications"][0]["args"]
        read = Path(arguments["api_keys_file"]).name
        if f"secretName: {name}\n" not in text or read != file:
            yield f"nothing reads {file} of {name}"
    if "-c" in words and f"name: {words[words.index('-c') + 1]}\n" not in text:
        yield "there is no such container"
    if "-l" in words and words[words.index("-l") + 1].replace("=", ": ") not in text:
        yield "no pod has such a label"
    if "-k" in words and words[words.index("-k") + 1] != "my-gma":
        yield "there is no such overlay"
    if "-p" in words:
        (operation,) = yaml.safe_load(words[words.index("-p") + 1])
        (at,) = (m for m in manifests if m["kind"] == "RayService")
        for step in operation["path"].strip("/").split("/")[:-1]:
            at = at[step]


def wrong_literals(words: list[str], keys: list[str]) -> Iterator[str]:
    """Of a Secret or a ConfigMap that a component reads."""
    name = words[words.index("-n") - 1]
    files = (ROOT / "deploy" / "kubernetes").glob("*/*.yaml")
    readers = [text for text in map(Path.read_text, files) if f"name: {name}" in text]
    if not readers:
        yield f"nothing reads {name}"
    for key in keys:
        # Of a ConfigMap all are read; rclone knows its own.
        known = (f"{{name: {name}, key: {key}}}", f'"${key}"', f':${key}"', f"${{{key}:-")
        if not key.startswith("RCLONE_S3_") and not any(x in r for r in readers for x in known):
            yield f"nothing reads {key} of {name}"


def wrong_gma(words: list[str]) -> Iterator[str]:
    command = typer.main.get_command(cli.app)
    with command.make_context("gma", list(words), resilient_parsing=True) as context:
        assert context.command is command
        found = getattr(command, "commands", {}).get(words[0])
        if found is None:
            yield f"there is no gma {words[0]}"
        else:
            found.make_context(words[0], words[1:]).close()


def wrong_path(words: list[str]) -> Iterator[str]:
    (url,) = (word for word in words if word.startswith("127.0.0.1:8000"))
    if url.partition("/")[2] not in ("health", "v1/documents"):
        yield f"there is no {url}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_what_is_there(command: str, manifests: list[Manifest]) -> None:
    assert list(wrong(command, manifests)) == []


@pytest.mark.parametrize(
    "command",
    [
        "helm install gma",
        "docker build --target tpu -t gma-service:cpu .",
        "docker build --target gpu --build-context kernel=kernels -t gma-service:gpu .",
        "docker run --rm --gpus all -v ./kernels:/kernel gma-service:gpu-build",
        "docker run gma:cpu",
        "kubectl destroy",
        "kubectl describe rayservice gmas -n gma",
        "kubectl wait -n gma --for=condition=Available deployment/gmas",
        "kubectl create secret generic gma-keys -n gma --from-file=api-keys",
        "kubectl create secret generic gma-api-keys -n gma --from-file=keys",
        "kubectl logs -n gma -c ray",
        "kubectl get pods -l app=gma",
        "kubectl apply -n gma -k deploy/kubernetes/tpu",
        "kubectl create secret generic gma-rediss -n gma --from-literal=password=a",
        "kubectl create secret generic gma-redis -n gma --from-literal=pass=a",
        "kubectl create configmap gma-model -n gma --from-literal=MODELS=a",
        "gma keys api-keys",
        "curl 127.0.0.1:8000/nowhere",
    ],
)
def test_a_command_that_is_wrong_is_caught(command: str, manifests: list[Manifest]) -> None:
    assert list(wrong(command, manifests))


def test_settings_exist() -> None:
    check_names(re.findall(r"\bGMA_[A-Z_]+\b", TEXT))


def test_durations_are_those_of_the_manifests(manifests: list[Manifest]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", TEXT, re.MULTILINE)
    assert len(rows) == 5
    text = yaml.safe_dump(manifests, width=10_000).replace("\\n", "\n")
    for name, seconds in rows:
        pattern = rf"{name}(: |\n *value: ['\"]){seconds}\b"
        assert re.search(pattern, text), name
    assert f"{Settings.model_fields['inbox_tokens'].default:,}" in TEXT


def test_every_example_is_in_the_table_of_what_people_change() -> None:
    table = TEXT[TEXT.index("### What people change") : TEXT.index("### Settings")]
    rows = [row.split(" | ")[1] for row in re.findall(r"^\| (?!what|--).*", table, re.MULTILINE)]
    named = re.findall(r"`(examples/[\w-]+)`", "".join(rows))
    folders = (ROOT / "deploy" / "kubernetes" / "examples").iterdir()
    assert sorted(named) == sorted(f"examples/{folder.name}" for folder in folders)


def test_files_and_links_are_there() -> None:
    for link in re.findall(r"\]\(([\w/]+\.md)(?:#[\w-]+)?\)", TEXT):
        assert (ROOT / "docs" / link).is_file(), link
    components = TEXT[TEXT.index("| component |") :]
    for name in re.findall(r"^\| `([^|]*)` \|[^|]*\|$", components, re.MULTILINE):
        for component in name.split("`, `"):
            assert (ROOT / "deploy" / "kubernetes" / component).is_dir(), component
    for file in re.findall(r"`((?:base|cpu|gpu|single|monitoring)/[\w.]+)`", TEXT):
        assert (ROOT / "deploy" / "kubernetes" / file).is_file(), file
