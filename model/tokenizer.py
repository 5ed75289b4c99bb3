"""Byte-level BPE that takes text in pieces cut anywhere and yields the tokens of the whole text.

Text is first split into words, then each word into tokens on its own. Words are bounded, so where
one ends depends on `WINDOW` characters from its start at most. Hence a document of any length, be
it without a single space, is tokenized in constant memory.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from gma.model.merges import LETTERS, Merges
from gma.model.words import GROUPED, SCAN, WINDOW, split

Tokens = npt.NDArray[np.int32]
"""Ids of a vocabulary, (tokens,)."""

_RUNS = (
    " \n-_.=\t*#"
    + string.punctuation
    + "\u2014\u2026\u2500\u2550\u00a0\u3000"
    + string.ascii_letters
)
"""Characters whose runs have tokens of their own, the likeliest first."""
_SHARE_OF_RUNS = 32  # of so many tokens, one at most is a run's


class NotUtf8(ValueError):
    """The document is not UTF-8; `offset` is the position of the first wrong byte in it."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"not UTF-8: invalid or unfinished character at byte {offset}")
        self.offset = offset


class Tokenizer:
    """A trained vocabulary. Lossless: the bytes of a text's tokens are the text's bytes.

    Safe to share between threads: encoding changes nothing and runs in the calling thread, outside
    Python's lock.
    """

    def __init__(self, bpe: hf.Tokenizer) -> None:
        """Raises `ValueError` that says what is wrong unless `bpe` is of the form `train` makes."""
        self._bpe = bpe
        spec = json.loads(bpe.to_str())
        self.byte_lengths = _byte_lengths(spec)
        """(vocab_size,) int32: the bytes of each token."""
        self._merges = Merges(bpe.model, spec["model"], GROUPED)

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> Self:
        """Learns at most `vocab_size` tokens, at least the 256 single bytes.

        Some are runs of one character, whether texts have them or not: a document of spaces or
        dashes would else have a token for each.
        """
        bpe = _untrained()
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size, initial_alphabet=_ALPHABET, show_progress=False
            ),
        )
        return cls(_with_runs(bpe, vocab_size))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a `tokenizer.json`. Raises `OSError`, or `ValueError` that says what is wrong."""
        try:
            return cls.parse(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """What a `tokenizer.json` says. Raises `ValueError` that says what is wrong."""
        try:
            return cls(hf.Tokenizer.from_buffer(text))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise ValueError(str(error)) from error

    def save(self, path: str | Path) -> None:
        """Writes the one file that `load` reads."""
        self._bpe.save(str(path))

    @property
    def vocab_size(self) -> int:
        return len(self.byte_lengths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that its tokens depend on."""
        return hashlib.sha256(self._bpe.to_str().encode()).hexdigest()

    def encode(self, text: str | bytes) -> Tokens:
        """The tokens of a whole text in one piece: (tokens,) int32. Raises `NotUtf8`."""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return self.encode_parts([_decode(data, start=0, final=True)[0]])

    def stream(self, pending: bytes = b"", offset: int = 0) -> TokenStream:
        """Tokens of a text that arrives in pieces, from its beginning by default.

        To continue another stream, give its `pending` bytes; `offset`, which only errors need, is
        where in the document they lie.
        """
        return TokenStream(self, pending, offset)

    def decode(self, tokens: Tokens) -> str:
        """The text of tokens, (n,); what is half a character becomes U+FFFD."""
        text: str = self._bpe.decode(tokens.tolist(), skip_special_tokens=False)
        return text

    def encode_parts(self, parts: list[str]) -> Tokens:
        """The tokens of each part on its own, joined."""
        found = [self._merges.tokens(part) for part in parts]
        return np.concatenate(found) if found else np.empty(0, np.int32)


class TokenStream:
    """The tokens of one document, as far as they are certain, while its bytes arrive.

    Joined, they equal `Tokenizer.encode` of the whole, however the bytes are cut. At most
    `MAX_PENDING` bytes are held back. Time is linear in the bytes, also when they come one by one.
    Not for several threads at once.
    """

    MAX_PENDING = 4 * (WINDOW - 1) + 3
    """Bytes: the characters that do not fill a window, and an unfinished one."""

    def __init__(self, tokenizer: Tokenizer, pending: bytes = b"", offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._pending = pending
        self._offset = offset

    @property
    def pending(self) -> bytes:
        """The bytes fed whose tokens later bytes could still change.

        They are all that a stream remembers: `tokenizer.stream(pending)` continues this one, and
        its `finish` tells the tokens that the document would have if it ended here.
        """
        return self._pending

    def feed(self, data: bytes) -> Tokens:
        """Takes the document's next bytes; returns (tokens,) int32, those no later byte can change.

        Raises `NotUtf8` and then leaves the stream as it was before these bytes.
        """
        data = self._pending + data
        text, decoded = _decode(data, self._offset, final=False)
        parts, rest = split(text)
        tokens = self._tokenizer.encode_parts(parts)
        taken = decoded - len(rest.encode())
        self._pending = data[taken:]
        self._offset += taken
        return tokens

    def rest(self) -> Tokens:
        """The tokens that would end the document here, (tokens,) int32; it may go on.

        An unfinished last character has none.
        """
        return self._tokenizer.encode_parts([_decode(self._pending, self._offset, final=False)[0]])

    def finish(self) -> Tokens:
        """Ends the document; returns its remaining tokens, (tokens,) int32.

        Raises `NotUtf8` if the last character is unfinished.
        """
        text, taken = _decode(self._pending, self._offset, final=True)
        self._pending = b""
        self._offset += taken
        return self._tokenizer.encode_parts([text])


_byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_ALPHABET = sorted(LETTERS)


def _decode(data: bytes, start: int, *, final: bool) -> tuple[str, int]:
    """Text and how many bytes it took: all if `final`, else all but an unfinished last character.

    `start` is where in the document `data` lies, for `NotUtf8`.
    """
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        raise NotUtf8(start + error.start) from None


def _untrained() -> hf.Tokenizer:
    bpe = hf.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([SCAN, _byte_level])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _with_runs(bpe: hf.Tokenizer, vocab_size: int) -> hf.Tokenizer:
    """The same with runs of one character for its last and rarest tokens, as far as it lacks them.

    What is learned last counts last: no other text has other tokens but for those that are gone.
    """
    spec = json.loads(bpe.to_str())
    merges = [tuple(pair) for pair in spec["model"]["merges"]]
    most = vocab_size - len(_ALPHABET)
    places = min(vocab_size // _SHARE_OF_RUNS, most)
    missing = _missing_runs(set(merges[: most - places]), places)
    kept = [*dict.fromkeys(merges[: most - len(missing)] + missing)]
    tokens = dict.fromkeys([*_ALPHABET, *map("".join, kept)])
    spec["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    spec["model"]["merges"] = kept
    return hf.Tokenizer.from_str(json.dumps(spec))


def _missing_runs(known: set[tuple[str, ...]], most: int) -> list[tuple[str, str]]:
    """At most so many merges that lead to runs, and are not known: all that a character takes."""
    found: list[tuple[str, str]] = []
    for character in dict.fromkeys(_RUNS):
        first, *rest = [*_byte_level.pre_tokenize_str(character)[0][0]]
        lacking = []
        for byte in rest:
            lacking.append((first, byte))
            first += byte
        longest = len(SCAN.pre_tokenize_str(character * WINDOW)[0][0])
        while len(first) // (len(rest) + 1) * 2 <= longest:
            lacking.append((first, first))
            first += first
        lacking = [pair for pair in lacking if pair not in known]
        if len(found) + len(lacking) <= most:
            found += lacking
    return found


def _byte_lengths(spec: dict[str, Any]) -> Tokens:
    """The bytes of each token of a serialised tokenizer, checked to be of `_untrained`'s form."""
    form = json.loads(_untrained().to_str())
    _check_equal(spec, form, except_for={"model"})
    _check_equal(spec["model"], form["model"], except_for={"vocab", "merges"})

    vocabulary: dict[str, int] = spec["model"]["vocab"]
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError("the vocabulary's ids are not 0, 1, 2, ... without gaps")
    alphabet = set(_ALPHABET)
    if missing := alphabet - vocabulary.keys():
        raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 single bytes")
    lengths = np.zeros(len(vocabulary), np.int32)
    for token, index in vocabulary.items():
        if not alphabet.issuperset(token):
            raise ValueError(f"token {index} is not written in the byte-level alphabet: {token!r}")
        lengths[index] = len(token)
    return lengths


def _check_equal(found: dict[str, Any], form: dict[str, Any], except_for: set[str]) -> None:
    for key in form.keys() - except_for:
        if found.get(key) != form[key]:
            raise ValueError(f"{key} must be {form[key]}, not {found.get(key)}")
