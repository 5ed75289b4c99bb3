"""How a document is to be answered, as Python programs say it and as requests do."""

from __future__ import annotations

from typing import TypedDict


class Options(TypedDict, total=False):
    """How a document is to be answered; what an older service does not know it refuses."""

    model: str | None
    """Which model of the service is to read it; one alone need not be named."""
    top_k: int | None
    """List the scores of the best so many labels; of all by default."""
    evidence: bool
    """Also tell which part of the document speaks for what."""
    components: bool
    """Also tell how much of the document each mixture component takes."""
    max_tokens: int | None
    """Read no more than the first so many; by default nothing is truncated."""


def query(
    *,
    model: str | None = None,
    top_k: int | None = None,
    evidence: bool = False,
    components: bool = False,
    max_tokens: int | None = None,
) -> dict[str, str]:
    """The parameters of a request. Raises TypeError for an option that there is not."""
    given = {
        "model": model,
        "top_k": top_k,
        "evidence": evidence or None,
        "components": components or None,
        "max_tokens": max_tokens,
    }
    return {
        name: value if isinstance(value, str) else str(value).lower()
        for name, value in given.items()
        if value is not None
    }
