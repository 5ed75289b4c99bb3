"""What is found in a text, as the commands print it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from math import exp, log1p
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import typer
from rich.console import Console
from rich.text import Text

from gma.service.cli.terminal import print_table, printable, table

if TYPE_CHECKING:
    from gma.service.gateway.contract import EvidenceSpan, Finding

BARS = "▁▂▃▄▅▆▇█"
STRIP_PLACES = 32

PASSAGES = 3
"""Of each label, at most."""

LINES = 2
"""Of a passage, at most."""

INDENT = 4

Range: TypeAlias = tuple[int, int]

Cut: TypeAlias = Callable[[Sequence[Range]], Mapping[Range, bytes]]
"""Takes ranges [start, end) of a text's bytes, and returns these."""


class Passage(NamedTuple):
    """A span that speaks for a label."""

    start: int
    end: int
    share: str


def print_finding(name: object, finding: Finding, listed: int | None = None) -> None:
    """Print a text's scores on stdout, with their strips if it has evidence.

    `name`: the text's. `listed`: how many labels, at most.
    """
    usage = finding["usage"]
    read = "the first " if "truncated" in finding else ""
    typer.echo(
        f"{printable(str(name))}: {read}{usage['bytes']:,} bytes, {usage['tokens']:,} tokens"
    )
    if not finding["scores"]:  # there is nothing yet that they could be of
        return
    numbers: tuple[Literal["score", "threshold"], ...] = ("score",)
    if "threshold" in finding["scores"][0]:
        numbers = "score", "threshold"
        typer.echo(f"there: {_there(finding) or 'none of the labels'}")
    spans = finding.get("evidence", [])
    scores = table("label", *numbers, *(["where"] if spans else []))
    for each in finding["scores"][:listed]:
        strip = [_strip(spans, each["label"])] if spans else []
        scores.add_row(each["label"], *(f"{each[number]:.3f}" for number in numbers), *strip)
    print_table(scores)


def print_passages(
    finding: Finding, pooling: Literal["mean", "any"], listed: int, cut: Cut
) -> None:
    """Print the passages that speak most for the labels that are there, or else for the best one.

    `finding` has the scores of all labels; `listed`: how many of these are told, at most.
    """
    if not finding["scores"]:
        return
    there = finding["labels"] if "labels" in finding else [finding["label"]]
    labels = [label for label in there if label] or [finding["scores"][0]["label"]]
    best = {label: _passages(finding, label, pooling) for label in labels[:listed]}
    console = Console()
    width = max(console.width - INDENT, 1)
    most = 4 * LINES * width  # bytes, of UTF-8
    texts = cut([_beginning(each, most) for passages in best.values() for each in passages])
    for label, passages in best.items():
        typer.echo(f"\n{label}")
        for passage in passages:
            typer.echo(f"  {passage.share}, bytes {passage.start:,} - {passage.end:,}")
            begin = _beginning(passage, most)
            for line in _lines(texts[begin], begin, passage.end, console, width):
                typer.echo(f"{' ' * INDENT}{line}")


def _passages(finding: Finding, label: str, pooling: Literal["mean", "any"]) -> list[Passage]:
    """The spans that speak most for a label, those with the most first."""
    spans = finding["evidence"]
    shares = [_share(span, label, pooling, relative="labels" not in finding) for span in spans]
    total = sum(shares)
    best = sorted(range(len(spans)), key=lambda n: -shares[n])[:PASSAGES]
    return [
        Passage(
            spans[n]["start"],
            spans[n]["end"],
            f"{shares[n] / total:.1%} of the evidence"
            if pooling == "any"
            else f"{shares[n]:+.3g} of {total:.3g} logits",
        )
        for n in best
        if shares[n] > 0
    ]


def _share(
    span: EvidenceSpan, label: str, pooling: Literal["mean", "any"], *, relative: bool
) -> float:
    """What a span contributes. `relative`: compared with the mean of all labels, for where labels
    exclude each other only differences of logits tell anything."""
    logits = {each["label"]: each["logit"] for each in span["scores"]}
    own = logits[label]
    if pooling == "any":
        return max(own, 0.0) + log1p(exp(-abs(own)))
    return span["weight"] * (own - (sum(logits.values()) / len(logits) if relative else 0.0))


def _beginning(passage: Passage, most: int) -> Range:
    return passage.start, min(passage.end, passage.start + most)


def _lines(data: bytes, begin: Range, end: int, console: Console, width: int) -> list[str]:
    """The first lines of a passage that ends at `end`, from a whole word on."""
    text = clean(data.decode(errors="ignore"))
    if begin[0]:
        text = re.sub(r"^\S{0,20}\s+", "… ", text)
    text = " ".join(text.split())
    lines = [line.plain.rstrip() for line in Text(text).wrap(console, width)]
    if len(lines) > LINES or begin[1] < end:
        last = Text(f"{' '.join(lines[LINES - 1 :])} …")
        last.truncate(width, overflow="ellipsis")
        lines[LINES - 1 :] = [last.plain]
    return lines


def clean(text: str) -> str:
    """The text without what commands a terminal, or turns the direction of writing."""

    def shown(character: str) -> str:
        kind = unicodedata.category(character)
        if kind == "Cf":
            return ""
        return " " if kind[0] == "C" or kind in ("Zl", "Zp") else character

    return "".join(map(shown, text))


def _there(said: Finding | EvidenceSpan) -> str:
    """The labels that are there, if any."""
    return ", ".join(said["labels"]) if "labels" in said else said["label"] or ""


def _strip(spans: list[EvidenceSpan], label: str) -> str:
    """The text from its beginning to its end: in each place the highest score of the spans there
    for the label."""
    highest = [0.0] * STRIP_PLACES
    end = spans[-1]["end"]
    for span in spans:
        score = next(each["score"] for each in span["scores"] if each["label"] == label)
        first = span["start"] * STRIP_PLACES // end
        for place in range(first, max(first + 1, span["end"] * STRIP_PLACES // end)):
            highest[place] = max(highest[place], score)
    return "".join(BARS[min(int(score * len(BARS)), len(BARS) - 1)] for score in highest)
