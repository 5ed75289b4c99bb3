"""Order of words, which no bag of them tells: a memory must know what came lately."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from gma.model.training.train import train
from tests.model.training.documents import COMMON, configuration, evaluations, write

PAIRS, APART, EACH = 18, 15, 8


@pytest.mark.long
def test_pairs_of_words_fifteen_apart(tmp_path: Path) -> None:
    rng = random.Random(0)
    for split, count in (("train", 600), ("valid", 60)):
        write(tmp_path / f"data/{split}.jsonl", [ordered(rng, i % 2 == 0) for i in range(count)])
    config = configuration(
        tmp_path / "order.toml",
        model={"vocab_size": 400, "width": 32, "routing_dim": 8, "value_dim": 16, "mlp_width": 64},
        steps=70,
        evaluate_every=70,
        tokens_per_step=3072,
        lengths=[[0.0, 128]],
        prefix=128,
        learning_rate=1e-2,
        dropout=0.0,
        token_dropout=[0.0, 0.0],
        label_smoothing=0.0,
        language_weight=[0.0, 0.0],
        average=0.9,
    )
    config.write_text(config.read_text().replace("steps = 10\n", "steps = 0\n"))
    (last,) = evaluations(train(tmp_path / "data", tmp_path / "run", config))
    assert last["valid"]["views"][-1]["accuracy"] > 0.95


def ordered(rng: random.Random, forwards: bool) -> dict[str, Any]:
    """A text in which some pairs of words stand apart, all of them one way round or the other."""
    words = [rng.choice(COMMON) for _ in range(100)]
    free = {*range(1, len(words))}
    for _ in range(EACH):
        pair = rng.randrange(PAIRS)
        first = rng.choice([i for i in free if i + APART in free])
        places = (first, first + APART) if forwards else (first + APART, first)
        words[places[0]], words[places[1]] = f"x{pair}", f"y{pair}"
        free -= {first, first + APART}
    return {"text": " ".join(words), "label": "forwards" if forwards else "backwards"}
