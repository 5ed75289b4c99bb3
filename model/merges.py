"""The merges of a byte-level BPE, done by tiktoken: one rank a token in place of one a pair.

A token comes about within a text as it does alone: until it does, nothing has been merged across
its ends, and what lies between them is merged in the same order. So the two tokens that make it are
always the same two, and only their merge's rank counts; a token that is several when alone never
comes about. Hence ranks of tokens say all that ranks of pairs do.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import models

Pair = tuple[str, str]

BYTES = 256


class Merges:
    """Splits text into words and those into tokens. Safe to share between threads."""

    def __init__(self, model: models.BPE, spec: dict[str, Any], words: str) -> None:
        """``spec`` is ``model`` serialised, with all single bytes; ``words`` the words' regex."""
        pairs: list[Pair] = [(left, right) for left, right in spec["merges"]]
        # Merges rank as they are listed; single bytes, which none makes, are numbered before them.
        ranks = {bytes([byte]): byte for byte in range(BYTES)}
        self._ids = np.zeros(BYTES + len(pairs), np.int32)
        self._ids[:BYTES] = [spec["vocab"][letter] for letter in LETTERS]
        for token, rank in _ranks(model, pairs).items():
            ranks[bytes(map(_BYTE_OF.__getitem__, token))] = BYTES + rank
            self._ids[BYTES + rank] = spec["vocab"][token]
        self._encoding = tiktoken.Encoding(
            "merges", pat_str=words, mergeable_ranks=ranks, special_tokens={}
        )

    def tokens(self, text: str) -> npt.NDArray[np.int32]:
        """The ids of a text's tokens, (tokens,), found in the calling thread, outside its lock."""
        ranks = self._encoding.encode_ordinary(text)
        return self._ids[np.fromiter(ranks, np.intp, len(ranks))]


def _letters() -> list[str]:
    """The byte-level alphabet: what is printable in Latin-1 is itself, the rest U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]


LETTERS = _letters()
"""How a vocabulary writes each byte."""

_BYTE_OF = {letter: byte for byte, letter in enumerate(LETTERS)}


def _ranks(model: models.BPE, pairs: list[Pair]) -> dict[str, int]:
    """The rank of the merge that makes each token, for those that ever come about."""
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    made = defaultdict(list)
    for left, right in pairs:
        made[left + right].append((left, right))
    return {
        token: ranks[own[0] if len(own) == 1 else _last_two(token, ranks)]
        for token, own in made.items()
        if len(model.tokenize(token)) == 1
    }


def _last_two(token: str, ranks: dict[Pair, int]) -> Pair:
    """The tokens that the last merge joins, of one that comes about."""
    parts = [*token]
    while len(parts) > 2:
        found = [ranks.get(pair, len(ranks)) for pair in pairwise(parts)]
        first = found.index(min(found))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]
