"""API keys: clients hold them, the service holds their hashes.

A keys file has one key's SHA-256 a line, in hexadecimal; after it, and on lines of its own, `#`
begins a comment. A key has 256 random bits, so a plain hash of it can't be searched for.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from hmac import compare_digest
from pathlib import Path
from typing import Self

_HASH = re.compile(r"[0-9a-f]{64}")


def new_key() -> str:
    """A key that nobody has yet."""
    return f"gma_{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """The line of a keys file that lets `key` pass."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """Which keys pass."""

    def __init__(self, hashes: Iterable[str]) -> None:
        self._hashes = tuple(hashes)

    @classmethod
    def load(cls, file: Path) -> Self:
        """The keys of a file. Raises ValueError if it can't be read, is malformed, or has none."""
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the API keys can't be read: {error}") from None
        hashes = []
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            # Not the line itself: it may be a key that was put there by mistake.
            if not _HASH.fullmatch(text):
                raise ValueError(
                    f"{file}:{number} is not a key's SHA-256 in hexadecimal: `gma key` prints one"
                )
            hashes.append(text)
        if not hashes:
            raise ValueError(f"{file} has no API keys: `gma key` makes one")
        return cls(hashes)

    def find(self, key: str) -> str | None:
        """The hash of `key` if it is one of them. Takes the same time whichever it is, if any."""
        given, found = hash_of(key), False
        for each in self._hashes:
            found |= compare_digest(given, each)
        return given if found else None
