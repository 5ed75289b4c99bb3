"""What is found in a text, as the commands print it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import typer

from gma.service.cli.terminal import print_table, table

if TYPE_CHECKING:
    from gma.service.gateway.contract import EvidenceSpan, Finding, LabelScore


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
    scores = table("label", *numbers)
    for each in finding["scores"]:
        scores.add_row(each["label"], *(f"{each[number]:.3f}" for number in numbers))
    print_table(scores)
    if "evidence" in finding:
        _print_evidence(finding["evidence"], finding["scores"])


def _there(said: Finding | EvidenceSpan) -> str:
    """The labels that are there, if any."""
    return ", ".join(said["labels"]) if "labels" in said else said["label"] or ""


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
