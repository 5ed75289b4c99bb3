"""As much of Kustomize as deploy/ uses: resources, components, images and JSON patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

KEYS = {"apiVersion", "kind", "resources", "components", "images", "patches"}


def build(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize FOLDER` prints. Raises ValueError for what this does not know."""
    (kustomization,) = _read(folder / "kustomization.yaml")
    if unknown := kustomization.keys() - KEYS:
        raise ValueError(f"{folder}: {', '.join(sorted(unknown))} is not known here")
    manifests: list[Manifest] = []
    for name in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        path = folder / name
        manifests += build(path) if path.is_dir() else _read(path)
    for patch in kustomization.get("patches", []):
        (operations,) = _read(folder / patch["path"])
        patched = [m for m in manifests if m["kind"] == patch["target"]["kind"]]
        if not patched:
            raise ValueError(f"{folder}: {patch['path']} patches nothing")
        for manifest in patched:
            for operation in operations:
                _apply(manifest, operation)
    images = {image["name"]: image for image in kustomization.get("images", [])}
    for manifest in manifests:
        _name(manifest, images)
    return manifests


def _read(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text()))


def _apply(manifest: Manifest, operation: dict[str, Any]) -> None:
    if operation["op"] != "add":
        raise ValueError(f"the operation {operation['op']} is not known here")
    *path, last = operation["path"].strip("/").split("/")
    at: Any = manifest
    for step in path:
        at = at[int(step)] if isinstance(at, list) else at[step]
    at[last] = operation["value"]


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
