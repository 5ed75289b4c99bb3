"""As much of Kustomize as deploy/ uses: resources, components, images, labels, config maps of
files, JSON patches, and the patch that deletes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

KEYS = {
    *("apiVersion", "kind", "resources", "components"),
    *("images", "labels", "patches", "configMapGenerator"),
}


def build(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize FOLDER` prints. Raises ValueError for what this does not know."""
    return _build(folder, [])


def _build(folder: Path, given: list[Manifest]) -> list[Manifest]:
    """The manifests of a folder; a component changes those that are given to it."""
    (kustomization,) = _read(folder / "kustomization.yaml")
    if unknown := kustomization.keys() - KEYS:
        raise ValueError(f"{folder}: {', '.join(sorted(unknown))} is not known here")
    manifests = [*given]
    for name in kustomization.get("resources", []):
        path = folder / name
        manifests += build(path) if path.is_dir() else _read(path)
    manifests += [_config_map(folder, each) for each in kustomization.get("configMapGenerator", [])]
    for name in kustomization.get("components", []):
        manifests = _build(folder / name, manifests)
    changed = False  # of patches for several kinds, those for kinds that are not there do nothing
    for patch in kustomization.get("patches", []):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        (operations,) = parsed(text)
        patched = [m for m in manifests if _is_target(m, patch["target"])]
        changed = changed or bool(patched)
        if isinstance(operations, dict):
            if operations.get("$patch") != "delete":
                raise ValueError(f"{folder} has a patch that is not known here")
            manifests = [m for m in manifests if m not in patched]
            continue
        for manifest in patched:
            for operation in operations:
                _apply(manifest, operation)
    if kustomization.get("patches") and not changed:
        raise ValueError(f"{folder} patches nothing")
    images = {image["name"]: image for image in kustomization.get("images", [])}
    for manifest in manifests:
        _name(manifest, images)
        for each in kustomization.get("labels", []):
            if each.keys() != {"pairs"}:
                raise ValueError(f"{folder}: labels of more than the resources are not known here")
            manifest["metadata"].setdefault("labels", {}).update(each["pairs"])
    return manifests


def parsed(text: str) -> list[Any]:
    """The documents of a YAML, to be changed: what anchors share is not one object."""
    documents: list[Any] = json.loads(_as_json(text))
    return documents


@cache
def _as_json(text: str) -> str:
    return json.dumps([*yaml.safe_load_all(text)])


def _read(file: Path) -> list[Any]:
    return parsed(file.read_text())


def _config_map(folder: Path, generator: dict[str, Any]) -> Manifest:
    options = generator["options"]
    if options.keys() - {"labels"} != {"disableNameSuffixHash"}:
        raise ValueError(f"{folder}: a name with a hash is not known here")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": generator["name"], "labels": options["labels"]},
        "data": {name: (folder / name).read_text() for name in generator["files"]},
    }


def _is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    name: str = manifest["metadata"]["name"]
    return manifest["kind"] == target["kind"] and bool(re.fullmatch(target.get("name", ".*"), name))


def _apply(manifest: Manifest, operation: dict[str, Any]) -> None:
    if operation["op"] != "add":
        raise ValueError(f"the operation {operation['op']} is not known here")
    steps = [step.replace("~1", "/") for step in operation["path"].strip("/").split("/")]
    *path, last = steps
    at: Any = manifest
    for step in path:
        at = at[int(step)] if isinstance(at, list) else at[step]
    value = json.loads(json.dumps(operation["value"]))
    if not isinstance(at, list):
        at[last] = value
    elif last == "-":
        at.append(value)
    else:
        raise ValueError(f"{operation['path']}: only the end of a list is known here")


def _name(at: Any, images: dict[str, dict[str, str]]) -> None:
    """Replace the names and tags of images, wherever they are."""
    if isinstance(at, list):
        for each in at:
            _name(each, images)
    elif isinstance(at, dict):
        for key, value in at.items():
            image = images.get(value.partition(":")[0]) if key == "image" else None
            if image:
                at[key] = f"{image.get('newName', image['name'])}:{image['newTag']}"
            else:
                _name(value, images)
