"""API keys: clients hold them, the service holds their hashes.

A keys file has one key's SHA-256 a line, in hexadecimal; beside it, what the key is allowed if that
is not the default: `documents_per_minute=60 bytes_per_day=1GiB`. After these, and on lines of its
own, `#` begins a comment. What follows a hash is the key's name. A key has 256 random bits, so a
plain hash of it can't be searched for.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from gma.service.gateway.allowance import UNLIMITED, Allowance, Key

_HASH = re.compile(r"[0-9a-f]{64}")


def new_key() -> str:
    """A key that nobody has yet."""
    return f"gma_{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """The line of a keys file that lets `key` pass."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """Which keys pass."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = {each.hash: each for each in keys}

    @classmethod
    def load(cls, file: Path, default: Allowance = UNLIMITED) -> Self:
        """The keys of a file, of which a nameless one is called by its hash's first eight digits;
        `default`: of what it says no allowance. Raises ValueError if it can't be read, is
        malformed, or has none."""
        try:
            if file.exists() and not file.is_file():
                raise OSError(f"{file} is no file")  # a pipe might never end
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the API keys can't be read: {error}") from None
        keys = []
        for number, line in enumerate(lines, 1):
            text, _, comment = map(str.strip, line.partition("#"))
            if not text:
                continue
            found, *allowed = text.split()
            # Not the line itself: it may be a key that was put there by mistake.
            if not _HASH.fullmatch(found):
                raise ValueError(
                    f"{file}:{number} is not a key's SHA-256 in hexadecimal: `gma key` prints one"
                )
            try:
                own = dict(each.split("=") for each in allowed)
                allowance = Allowance.model_validate({**dict(default), **own}) if own else default
                if len(own) < len(allowed):
                    raise ValueError("one is given twice")
            except ValueError:  # pydantic's too
                raise ValueError(
                    f"{file}:{number} has more than a hash, and it is not what a key is allowed: "
                    "documents_per_minute=60 or bytes_per_day=1GiB, or both"
                ) from None
            keys.append(Key(found, comment or found[:8], allowance))
        if not keys:
            raise ValueError(f"{file} has no API keys: `gma key` makes one")
        return cls(keys)

    def find(self, key: str) -> Key | None:
        """What is known of `key` if it is one of them. How long it takes tells of hashes at most,
        and nobody finds a key by its hash."""
        return self._keys.get(hash_of(key))
