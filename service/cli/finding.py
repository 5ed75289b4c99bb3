"""What is found in a text, as the commands print it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import typer

from gma.service.cli.terminal import print_table, table

if TYPE_CHECKING:
    from gma.service.gateway.contract import EvidenceSpan, Finding, LabelScore

BARS = "▁▂▃▄▅▆▇█"
STRIP_PLACES = 32


def print_finding(name: object, finding: Finding) -> None:
    """Print a text's scores on stdout, and its evidence if there is any. `name`: the text's."""
    usage = finding["usage"]
    read = "the first " if "truncated" in finding else ""
    typer.echo(f"{name}: {read}{usage['bytes']:,} bytes, {usage['tokens']:,} tokens")
    if not finding["scores"]:  # there is nothing yet that they could be of
        return
    numbers: tuple[Literal["score", "threshold"], ...] = ("score",)
    if "threshold" in finding["scores"][0]:
        numbers = "score", "threshold"
        typer.echo(f"there: {_there(finding) or 'none of the labels'}")
    spans = finding.get("evidence", [])
    scores = table("label", *numbers, *(["where"] if spans else []))
    for each in finding["scores"]:
        strip = [_strip(spans, each["label"])] if spans else []
        scores.add_row(each["label"], *(f"{each[number]:.3f}" for number in numbers), *strip)
    print_table(scores)
    if spans:
        _print_evidence(spans, finding["scores"])


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


def _print_evidence(spans: list[EvidenceSpan], listed: list[LabelScore]) -> None:
    labels = [each["label"] for each in listed]
    rows = table("bytes", "weight", "label", *labels)
    for span in spans:
        scores = {each["label"]: f"{each['score']:.3f}" for each in span["scores"]}
        rows.add_row(
            f"{span['start']:,} - {span['end']:,}",
            f"{span['weight']:.1%}",
            _there(span),
            *(scores[label] for label in labels),
        )
    print_table(rows)
