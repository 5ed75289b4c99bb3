"""A document as a JSON object: its options are decoded at once, its text a piece at a time.

The text is most of a request and may be as long as the limit; as a Python string it could take four
times its bytes. So the object's few members are found where they lie, and what they hold is decoded
by msgspec, the text when it is read.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any

import msgspec
from pydantic import ValidationError

from gma.model.config import LONGEST_INPUT, problems
from gma.service.errors import NotJson, NotUtf8, Validation
from gma.service.gateway.contract import DocumentRequest, Options
from gma.service.gateway.document import PIECE_BYTES
from gma.service.http.media import shown

_SPACE = rb"[ \t\r\n]*+"
_BEGIN = re.compile(rb"(?:\xef\xbb\xbf)?+" + _SPACE)  # a byte order mark is let pass
_OTHER_VALUE = re.compile(rb'["\[0-9tfn-]')
_OPEN = re.compile(rb"\{" + _SPACE)
_CLOSE = re.compile(_SPACE + rb"\}" + _SPACE)
_COMMA = re.compile(_SPACE + rb"," + _SPACE)
_KEY = re.compile(rb'"((?:[^"\\\x00-\x1f]|\\[^\x00-\x1f]){0,%d})' % LONGEST_INPUT)
_COLON = re.compile(rb'"' + _SPACE + rb":" + _SPACE)
_SCALAR = re.compile(rb"true|false|null|-?[0-9][-+.0-9eE]*+")
_QUOTE = re.compile(rb'"')
# As much of a string as there is whole: no escape is cut, nor the two of one character. Groups are
# not possessive: before Python 3.11.5 such a one keeps what it had of an iteration that fails.
_STRING = re.compile(
    rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u(?:(?![dD][89a-fA-F])[0-9a-fA-F]{4}|'
    rb"[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})))*"
)
_CUT_CHARACTER = re.compile(rb"[\xc0-\xff][\x80-\xbf]*\Z")


class JsonText:
    """A string within a JSON document, as it was sent."""

    def __init__(self, body: bytes, cuts: list[int]) -> None:
        """It is what `body` has from the first of `cuts` to the last, and can be cut at each."""
        self._body = body
        self._cuts = cuts

    async def pieces(self) -> AsyncGenerator[tuple[bytes, bool]]:
        """The text in UTF-8, in pieces of at most PIECE_BYTES, each with whether it is the last.

        Raises NotUtf8.
        """
        for start, end in pairwise(self._cuts):
            piece = self._body[start:end]
            yield _decoded(piece) if b"\\" in piece else piece, end == self._cuts[-1]

    def beginning(self) -> str:
        """What a message may repeat of it."""
        return shown(self._body[self._cuts[0] : self._cuts[-1]][: 2 * LONGEST_INPUT])


def parsed(body: bytes, defaults: Options) -> tuple[Options, JsonText]:
    """The options and the text of a JSON request; what it leaves out of the options is as in
    `defaults`.

    Raises NotJson, NotUtf8 or Validation, for the first thing that is wrong.
    """
    members = _Cursor(body).members()
    if "text" not in members:
        raise Validation("text is missing")
    text = members.pop("text")
    if not isinstance(text, JsonText):
        raise Validation("text: input should be a valid string")
    if not members:
        return defaults, text
    given = {
        name: value.beginning() if isinstance(value, JsonText) else value
        for name, value in members.items()
    }
    try:
        options = defaults.model_dump(exclude_unset=True) | given
        return Options.model_validate(options, strict=True), text
    except ValidationError as error:
        raise Validation(problems(error)) from None


class _Cursor:
    """Reads an object from its beginning on, and goes no further than the first wrong thing."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def members(self) -> dict[str, Any]:
        """The members of the object that is the whole body; strings are JsonText."""
        self._take(_BEGIN)
        if _OTHER_VALUE.match(self._body, self._at):
            raise Validation("input should be an object")
        self._take(_OPEN)
        members: dict[str, Any] = {}
        while not self._sees(_CLOSE):
            if members:
                self._take(_COMMA)
            name = self._name()
            if name in members:
                raise Validation(f"{name} is given twice")
            members[name] = self._value(name)
        self._take(_CLOSE)
        if self._at < len(self._body):
            raise self._not_json()
        return members

    def _name(self) -> str:
        raw = self._take(_KEY)[1]
        if self._rest_of_string(12):  # an escape has up to twelve
            raise Validation(f"{shown(raw)}... is unknown")
        self._take(_COLON)
        name = _decoded(raw).decode()
        if name not in DocumentRequest.model_fields:
            raise Validation(f"{shown(name)} is unknown")
        return name

    def _value(self, name: str) -> Any:
        if self._sees(_QUOTE):
            return self._string()
        if self._body[self._at : self._at + 1] in (b"[", b"{"):
            raise Validation(f"{name}: input should be neither a list nor an object")
        scalar = self._take(_SCALAR)[0]
        if len(scalar) > LONGEST_INPUT:
            raise Validation(f"{name}: the number is too long")
        try:
            value = msgspec.json.decode(scalar)
        except msgspec.DecodeError:
            raise self._not_json() from None
        # In JSON 1.0 is an integer too.
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def _string(self) -> JsonText:
        self._take(_QUOTE)
        cuts = [self._at]
        while not self._sees(_QUOTE):
            size = self._rest_of_string(PIECE_BYTES)
            if not size:
                raise self._not_json()
            self._at += size
            if size == PIECE_BYTES and (
                cut := _CUT_CHARACTER.search(self._body, self._at - 3, self._at)
            ):
                self._at = cut.start()
            cuts.append(self._at)
        if len(cuts) == 1:
            cuts.append(self._at)
        self._take(_QUOTE)
        return JsonText(self._body, cuts)

    def _rest_of_string(self, most: int) -> int:
        """How many of the next `most` bytes belong to the string that was begun."""
        found = _STRING.match(self._body, self._at, self._at + most)
        return found.end() - self._at if found else 0

    def _sees(self, pattern: re.Pattern[bytes]) -> bool:
        return pattern.match(self._body, self._at) is not None

    def _take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        found = pattern.match(self._body, self._at)
        if not found:
            raise self._not_json()
        self._at = found.end()
        return found

    def _not_json(self) -> NotJson:
        return NotJson(f"the body is not JSON, from byte {self._at} on")


def _decoded(piece: bytes) -> bytes:
    """What is between the quotes of a string, in UTF-8. Raises NotUtf8, NotJson."""
    try:
        return msgspec.json.decode(b'"%b"' % piece, type=str).encode()
    except UnicodeDecodeError:
        raise NotUtf8 from None
    except msgspec.DecodeError as error:
        raise NotJson(f"the body is not JSON: {error}") from None
