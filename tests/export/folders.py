"""What anybody could do to an exported folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from onnx import ModelProto, TensorProto


def resign(folder: Path, **changes: object) -> None:
    """Write a manifest that names the files as they are."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    file.write_text(json.dumps(manifest | changes))


def weight_of(model: ModelProto, name: str) -> TensorProto:
    """Find a weight of the model, to be changed."""
    (tensor,) = (x for x in model.graph.initializer if x.name == name)
    assert isinstance(tensor, TensorProto)
    return tensor
