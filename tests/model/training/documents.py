"""Very little to train on, a run of seconds, and what it left."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gma.model.training.evaluation import measure_tokens

Train = Callable[..., Path]
Tables = dict[str, dict[str, Any]]

WORDS = {
    "sea": ["ship", "wave", "sail", "storm", "harbour", "anchor", "deck", "tide"],
    "farm": ["field", "cow", "barn", "wheat", "plough", "hay", "orchard", "goat"],
    "court": ["judge", "law", "oath", "plea", "jury", "clerk", "verdict", "bench"],
}
LABELS = "court", "farm", "sea"
COMMON = ["the", "a", "of", "and", "to", "in", "it", "was", "he", "she", "that", "with"]


def document(rng: random.Random, label: str, words: int) -> dict[str, Any]:
    text = " ".join(
        rng.choice(COMMON if rng.random() < 0.6 else WORDS[label]) for _ in range(words)
    )
    return {"text": text, "label": label, "id": rng.random()}


def documents(seed: int, each: int, words: int = 150) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [document(rng, label, words) for label in WORDS for _ in range(each)]


def passages_in_noise(seed: int, count: int, words: int = 500) -> list[dict[str, Any]]:
    """Common words, and a few of each label's in one place."""
    rng = random.Random(seed)
    lines = []
    for i in range(count):
        labels = [label for bit, label in enumerate(LABELS) if i >> bit & 1]
        text, spans = "", []
        at = sorted(rng.sample(range(words), len(labels)))
        for word in range(words):
            for label, _ in filter(lambda x: x[1] == word, zip(labels, at, strict=True)):
                passage = " ".join(rng.choices(WORDS[label], k=6))
                spans.append({"label": label, "start": len(text), "end": len(text + passage)})
                text += passage + " "
            text += rng.choice(COMMON) + " "
        lines.append({"text": text, "labels": labels, "spans": spans})
    return lines


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(zstandard.compress(data) if file.suffix == ".zst" else data)


def configuration(file: Path, **training: Any) -> Path:
    """A run of seconds; ``training`` overrides."""
    model = {
        "name": "tiny",
        "vocab_size": 300,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "routing_dim": 4,
        "value_dim": 8,
        "num_components": 4,
        "mlp_width": 16,
        **training.pop("model", {}),
    }
    tables: Tables = {
        "model": model,
        "training": {
            "steps": 8,
            "tokens_per_step": 512,
            "lengths": [[0.0, 64], [0.5, 128]],
            "prefix": 32,
            "evaluate_every": 4,
            "dropout": 0.2,
            **training,
        },
        "training.token_scores": {"steps": 10, "crops": 16, "length": 128},
    }
    file.write_text(
        "\n".join(
            f"[{name}]\n"
            + "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
            for name, table in tables.items()
        )
    )
    return file


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    lines = (checkpoint.parent / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def evaluations(checkpoint: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(checkpoint) if "valid" in line]


@contextmanager
def interrupted() -> Iterator[None]:
    """A training within is interrupted at its second evaluation, and must be by then."""
    calls = 0

    def measured(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measure_tokens(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gma.model.training.run.measure_tokens", measured)
        with pytest.raises(KeyboardInterrupt):
            yield
