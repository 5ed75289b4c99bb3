"""`gma classify` and `gma info` with models that say which labels are there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.service.asgi import LABELS, TEXT, save_checkpoint
from tests.service.deciding import deciding
from tests.service.test_cli import Gma
from tests.service.test_cli import gma as gma

AGREEMENT = Path(__file__).parents[2] / "docs/examples/agreement.txt"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


class TestClassify:
    @pytest.mark.parametrize("there", [(), ("cyd",), LABELS])
    def test_table_of_a_multi_label_model(
        self, gma: Gma, tmp_path: Path, text: Path, there: tuple[str, ...]
    ) -> None:
        checkpoint = deciding(tmp_path / "tiny", there, multi_label=True)
        options = ["--checkpoint", checkpoint, text]
        (answer,) = gma("classify", "--json", *options).json()
        assert set(answer["labels"]) == set(there)
        lines = gma("classify", "--evidence", "--top-k", 1, *options).out.splitlines()
        assert lines[1] == f"there: {', '.join(answer['labels']) or 'none of the labels'}"
        assert lines[2].split() == ["label", "score", "threshold", "where"]
        best = answer["scores"][0]
        assert lines[3].split()[:-1] == [
            best["label"],
            f"{best['score']:.3f}",
            f"{best['threshold']:.3f}",
        ]
        assert lines[4:6] == ["", [*answer["labels"], best["label"]][0]]

    @pytest.mark.parametrize("there", [(), LABELS])
    def test_table_of_a_single_label_model_with_thresholds(
        self, gma: Gma, tmp_path: Path, text: Path, there: tuple[str, ...]
    ) -> None:
        checkpoint = deciding(tmp_path / "tiny", there, multi_label=False)
        options = ["--checkpoint", checkpoint, text]
        (answer,) = gma("classify", "--json", *options).json()
        assert answer["label"] == (answer["scores"][0]["label"] if there else None)
        lines = gma("classify", *options).out.splitlines()
        assert lines[1] == f"there: {answer['label'] or 'none of the labels'}"
        assert lines[2].split() == ["label", "score", "threshold"]

    def test_a_strip_says_where(self, gma: Gma) -> None:
        lines = gma("classify", "--evidence", "--top-k", 2, AGREEMENT).out.splitlines()
        # Its four spans end at bytes 921, 1,906, 2,748 and 3,142.
        strip = 9 * "▁" + 10 * "▄" + 8 * "█" + 5 * "▁"
        assert lines[3].split()[0::3] == ["cap_on_liability", strip]
        assert lines[4].split()[0::3] == ["anti_assignment", 27 * "▁" + 5 * "█"]

    def test_passages_say_why(self, gma: Gma, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        out = gma("classify", "--evidence", "--top-k", 2, AGREEMENT).out
        _, first, second = out.split("\n\n")
        (answer,) = gma("classify", "--json", "--evidence", AGREEMENT).json()
        for told, label in (first, "cap_on_liability"), (second, "anti_assignment"):
            name, best, *_ = told.splitlines()
            assert name == label
            shares = [
                math.log1p(math.exp(each["logit"]))
                for span in answer["evidence"]
                for each in span["scores"]
                if each["label"] == label
            ]
            span = answer["evidence"][shares.index(max(shares))]
            share = f"{max(shares) / sum(shares):.1%} of the evidence"
            assert best == f"  {share}, bytes {span['start']:,} - {span['end']:,}"
        quoted = [line for line in second.splitlines() if line.startswith("    ")][:2]
        assert quoted[0].startswith("    … ")
        assert quoted[1].endswith("…")
        assert max(map(len, quoted)) <= 60
        span = answer["evidence"][-1]
        text = " ".join(AGREEMENT.read_bytes()[span["start"] :].decode().split())
        assert " ".join(" ".join(quoted).split()).strip("… ") in text

    def test_the_environment_names_the_model(
        self, gma: Gma, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GMA_CHECKPOINT", "books")
        assert gma("classify", "--json", text).json()[0]["model"] == "books"
        (other,) = gma("classify", "--json", "--checkpoint", "contracts", text).json()
        assert other["model"] == "contracts"


def test_the_average_of_two_is_a_checkpoint(gma: Gma, tmp_path: Path, text: Path) -> None:
    for split, words in ("train", TEXT), ("valid", TEXT[::-1]):
        lines = ({"text": words * n, "labels": LABELS[:n]} for n in (1, 2, 3))
        file = tmp_path / f"data/{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    alike = [deciding(tmp_path / label, (label,), multi_label=True) for label in LABELS[:2]]
    result = gma("average", *alike, "--data", tmp_path / "data", "--out", tmp_path / "mean")
    assert result.out.strip() == str(tmp_path / "mean")
    assert "micro-F1" in result.err
    (answer,) = gma("classify", "--json", "--checkpoint", tmp_path / "mean", text).json()
    assert {each["label"] for each in answer["scores"]} == set(LABELS)


@pytest.mark.parametrize("name", ["contracts", "books", "base"])
def test_info_of_what_comes_with_gma(gma: Gma, name: str) -> None:
    assert ["name", name] in [line.split() for line in gma("info", name).out.splitlines()]


def test_info_tells_the_thresholds(gma: Gma, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, multi_label=True, thresholds=(0.0, 0.25, 1.0))
    lines = [line.split() for line in gma("info", checkpoint).out.splitlines()]
    assert ["multi_label", "True"] in lines
    assert ["thresholds", "0.0,", "0.25,", "1.0"] in lines
    description = json.loads(gma("info", checkpoint, "--json").out)
    assert description["thresholds"] == [0.0, 0.25, 1.0]
