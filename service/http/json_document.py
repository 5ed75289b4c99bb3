"""A document as a JSON object, read while it comes: what is wrong with it is told at once.

The text is most of a request and may be as long as the limit; as a Python string it could take four
times its bytes. So the object's few members are found where they lie, and what they hold is decoded
by msgspec, the text when it is read.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import msgspec
from pydantic import TypeAdapter, ValidationError

from gma.model.config import LONGEST_INPUT, problems
from gma.service.errors import NotJson, NotUtf8, Validation
from gma.service.gateway.contract import DocumentRequest, LineId, LineRequest, Options
from gma.service.gateway.document import PIECE_BYTES, SMALL_BYTES, Pieces
from gma.service.http.media import shown

_SPACE = re.compile(rb"[ \t\r\n]*+")
_MARK = re.compile(rb"(?:\xef\xbb\xbf)?+")  # a byte order mark is let pass
_OTHER_VALUE = re.compile(rb'["\[0-9tfn-]')
_NESTED = re.compile(rb"[\[{]")
_OPEN = re.compile(rb"\{")
_CLOSE = re.compile(rb"\}")
_OPEN_LIST = re.compile(rb"\[")
_CLOSE_LIST = re.compile(rb"\]")
_COMMA = re.compile(rb",")
_COLON = re.compile(rb":")
_QUOTE = re.compile(rb'"')
_BEGUN = re.compile(rb'"((?:[^"\\\x00-\x1f]|\\[^\x00-\x1f]){0,%d})("?)' % LONGEST_INPUT)
_SCALAR = re.compile(rb"true|false|null|-?[0-9][-+.0-9eE]{0,%d}" % LONGEST_INPUT)
# As much of a string as there is whole: no escape is cut, nor the two of one character. Groups are
# not possessive: before Python 3.11.5 such a one keeps what it had of an iteration that fails.
_STRING = re.compile(
    rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u(?:(?![dD][89a-fA-F])[0-9a-fA-F]{4}|'
    rb"[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})))*"
)
# What may be the beginning of what is looked for, if nothing follows yet; of other patterns, which
# are one byte, nothing is.
_UNDECIDED = {
    _MARK: re.compile(rb"|\xef|\xef\xbb"),
    _BEGUN: re.compile(rb'"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*\\?'),
    _SCALAR: re.compile(rb"-?[0-9][-+.0-9eE]*|-|t(?:ru?)?|f(?:a|als?)?|n(?:ul?)?"),
}
_CUT_IN_STRING = re.compile(
    rb"(?:[\xc0-\xff][\x80-\xbf]*|\\(?:u(?:[0-9a-fA-F]{0,3}|[dD][89abAB][0-9a-fA-F]{2}"
    rb"(?:\\(?:u[0-9a-fA-F]{0,3})?)?)?)?)?"
)
_CUT_CHARACTER = re.compile(rb"[\xc0-\xff][\x80-\xbf]*\Z")

_ID: TypeAdapter[str | int | None] = TypeAdapter(LineId | None)

AT_ONCE = PIECE_BYTES // 8
"""Bytes of a string that are looked at before others have their turn: a few milliseconds."""

AHEAD = 12
"""Bytes behind a place that settle what is there: an escape has up to so many."""

MOST_VALUES = 512
"""Of all kinds in a request whose members are not known beforehand: each costs more than its bytes
say, and a text its answer."""

MOST_BYTES = 4096
"""Of a string that is taken whole: the name of a member, or of a model."""

STRINGS = ("model",)
"""Options that are strings."""

MOST_DEPTH = 8
"""Of lists and objects within each other."""


class JsonText:
    """A string within a JSON document, as it was sent. It is read once."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces = [bytearray()]  # each of whole characters

    @property
    def empty(self) -> bool:
        """Whether there is no character in it. Of one that was not read yet."""
        return not self._pieces[0]

    def whole(self) -> str:
        """What it says, of one that is no text. Raises NotJson, and Validation if it is long."""
        if sum(map(len, self._pieces)) > MOST_BYTES:
            raise Validation(f"a string that is no text has more than {MOST_BYTES} bytes")
        return _decoded(b"".join(self._pieces)).decode()

    def append(self, more: bytes) -> None:
        """Add what follows, cut between characters, at most PIECE_BYTES."""
        if len(self._pieces[-1]) + len(more) > PIECE_BYTES:
            self._pieces.append(bytearray())
        self._pieces[-1] += more

    async def pieces(self) -> AsyncGenerator[tuple[bytes, bool]]:
        """The text in UTF-8, in pieces of at most PIECE_BYTES, each with whether it is the last."""
        pieces, self._pieces = deque(self._pieces), []
        while pieces:
            piece = bytes(pieces.popleft())
            yield _decoded(piece) if b"\\" in piece else piece, not pieces


async def parsed(pieces: Pieces, defaults: Options) -> tuple[Options, JsonText]:
    """The options and the text of a JSON request that comes in `pieces`; what it leaves out of the
    options is as in `defaults`.

    Raises NotJson, NotUtf8 or Validation for the first thing that is wrong, as soon as it has come.
    """
    return _told(await _Cursor(pieces).members(), defaults)


async def parsed_line(
    pieces: Pieces, defaults: Options, on_id: Callable[[str | int], None]
) -> tuple[Options, JsonText]:
    """The options and the text of a line of a batch, as `parsed` has them. `on_id` is called with
    the line's id once that has come."""
    members = await _Cursor(pieces, "line", LineRequest, on_id).members()
    members.pop("id", None)
    return _told(members, defaults)


def _told(members: dict[str, Any], defaults: Options) -> tuple[Options, JsonText]:
    if "text" not in members:
        raise Validation("text is missing")
    text = members.pop("text")
    return defaults.model_copy(update=members), text


async def parsed_object(pieces: Pieces) -> dict[str, Any]:
    """The object that comes in `pieces`: as `json.loads` has it, but for its strings, which are
    JsonText wherever they lie.

    Raises NotJson, NotUtf8 or Validation for the first thing that is wrong, as soon as it has come.
    """
    return await _Cursor(pieces).any_members()


_Name: TypeAlias = Callable[[], Awaitable[str]]
_Member: TypeAlias = Callable[[str], Awaitable[Any]]
"""What reads the name of a member, and its value."""


class _Cursor:
    """Reads an object from its beginning on, and goes no further than the first wrong thing."""

    def __init__(
        self,
        pieces: Pieces,
        what: str = "body",
        request: type[DocumentRequest] = DocumentRequest,
        on_id: Callable[[str | int], None] | None = None,
    ) -> None:
        """`what` it is that the object is the whole of, for messages; the members that it may have
        are those of `request`."""
        self._pieces = pieces
        self._what = what
        self._request = request
        self._on_id = on_id
        self._held = b""  # what has come, but for earlier pieces that were read
        self._at = 0
        self._before = 0  # bytes that are not held any more
        self._ended = False
        self._values = 0

    async def members(self) -> dict[str, Any]:
        """The members of the object that is the whole body: valid options, and JsonText."""
        return await self._whole(self._name, self._member)

    async def any_members(self) -> dict[str, Any]:
        """The members of the object that is the whole body, whatever they are."""
        return await self._whole(self._any_name, self._value)

    async def _whole(self, name: _Name, member: _Member) -> dict[str, Any]:
        await self._take(_MARK)
        if await self._sees(_OTHER_VALUE):
            raise Validation("input should be an object")
        members = await self._object(name, member)
        await self._skip_space()
        if self._at < len(self._held):
            raise self._not_json()
        return members

    async def _object(self, read_name: _Name, member: _Member) -> dict[str, Any]:
        await self._next(_OPEN)
        members: dict[str, Any] = {}
        while not await self._sees(_CLOSE):
            if members:
                await self._next(_COMMA)
            name = await read_name()
            if name in members:
                raise Validation(f"{shown(name)} is given twice")
            await self._next(_COLON)
            members[name] = await member(name)
        await self._next(_CLOSE)
        return members

    async def _member(self, name: str) -> Any:
        if name == "text":
            return await self._text()
        return await (self._id() if name == "id" else self._option(name))

    async def _any_name(self) -> str:
        return (await self._string()).whole()

    async def _value(self, name: str, depth: int = 1) -> Any:
        """What comes next, within so many lists and objects. `name`: the member that it is of."""
        self._values += 1
        if self._values > MOST_VALUES:
            raise too_many()
        if await self._sees(_QUOTE):
            return await self._string()
        if not await self._sees(_NESTED):
            return await self._scalar(shown(name))
        if depth == MOST_DEPTH:
            raise Validation(f"there are more than {MOST_DEPTH} lists and objects in each other")
        if await self._sees(_OPEN):
            return await self._object(self._any_name, partial(self._value, depth=depth + 1))
        await self._next(_OPEN_LIST)
        found: list[Any] = []
        while not await self._sees(_CLOSE_LIST):
            if found:
                await self._next(_COMMA)
            found.append(await self._value(name, depth + 1))
        await self._next(_CLOSE_LIST)
        return found

    async def _name(self) -> str:
        raw, end = (await self._next(_BEGUN)).groups()
        if not end and self._rest_of_string():
            raise Validation(f"{shown(raw)}... is unknown")
        if not end:
            raise self._not_json()
        name = _decoded(raw).decode()
        if name not in self._request.model_fields:
            raise Validation(f"{shown(name)} is unknown")
        return name

    async def _option(self, name: str) -> Any:
        value: Any
        if not await self._sees(_QUOTE):
            value = await self._scalar(name)
        elif name in STRINGS:
            value = (await self._string()).whole()
        else:  # its beginning is for the message
            value = shown((await self._next(_BEGUN))[1])
        try:
            return getattr(Options.model_validate({name: value}, strict=True), name)
        except ValidationError as error:
            raise Validation(problems(error)) from None

    async def _id(self) -> None:
        quoted = await self._sees(_QUOTE)
        value = (await self._string()).whole() if quoted else await self._scalar("id")
        try:
            found = _ID.validate_python(value, strict=True)
        except ValidationError:
            raise Validation(
                "id: input should be a string of at most 256 characters, or an integer of 64 bits"
            ) from None
        if self._on_id and found is not None:
            self._on_id(found)

    async def _scalar(self, name: str) -> Any:
        if await self._sees(_NESTED):
            raise Validation(f"{name}: input should be neither a list nor an object")
        scalar = (await self._next(_SCALAR))[0].decode()
        if len(scalar) > LONGEST_INPUT:
            raise Validation(f"{name}: the number is too long")
        try:
            value = json.loads(scalar)
        except ValueError:
            raise self._not_json() from None
        # In JSON 1.0 is an integer too.
        return int(value) if isinstance(value, float) and value.is_integer() else value

    async def _text(self) -> JsonText:
        if not await self._sees(_QUOTE):
            await self._scalar("text")
            raise Validation("text: input should be a valid string")
        return await self._string()

    async def _string(self) -> JsonText:
        await self._next(_QUOTE)
        text = JsonText()
        while not _QUOTE.match(self._held, self._at):
            if run := self._rest_of_string():
                text.append(run)
                self._at += len(run)
                await _rest(len(run))
            elif self._ended or not _CUT_IN_STRING.fullmatch(self._held, self._at):
                raise self._not_json()
            else:
                await self._more()
        self._at += 1
        return text

    def _rest_of_string(self) -> bytes:
        """What there is of the string that was begun, at most AT_ONCE of whole characters.

        Raises NotUtf8.
        """
        found = _STRING.match(self._held, self._at, self._at + AT_ONCE)
        end = found.end() if found else self._at
        cut = _CUT_CHARACTER.search(self._held, max(self._at, end - 3), end)
        # In front of a quote or an escape it is no cut one, but a wrong one.
        if cut and (end - self._at == AT_ONCE or (end == len(self._held) and not self._ended)):
            end = cut.start()
        run = self._held[self._at : end]
        try:
            run.decode()
        except UnicodeDecodeError:
            raise NotUtf8 from None
        return run

    async def _next(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        """What comes next after space, if any. Raises NotJson."""
        await self._skip_space()
        return await self._take(pattern)

    async def _sees(self, pattern: re.Pattern[bytes]) -> bool:
        """Whether the next byte after space, if any, is such a one."""
        await self._skip_space()
        return pattern.match(self._held, self._at) is not None

    async def _take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        while True:
            found = pattern.match(self._held, self._at)
            if self._settled(pattern, found.end() if found else self._at):
                break
            await self._more()
        if not found:
            raise self._not_json()
        self._at = found.end()
        return found

    async def _skip_space(self) -> None:
        while True:
            space = _SPACE.match(self._held, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._held) or self._ended:
                return
            await self._more()

    def _settled(self, pattern: re.Pattern[bytes], end: int) -> bool:
        """Whether what was found up to `end` is the same whatever is still to come."""
        if self._ended or len(self._held) - end >= AHEAD:
            return True
        undecided = _UNDECIDED.get(pattern)
        return not (undecided and undecided.fullmatch(self._held, self._at))

    async def _more(self) -> None:
        await _rest(self._at)
        piece, self._ended = await anext(self._pieces)
        self._before += self._at
        self._held = self._held[self._at :] + piece
        self._at = 0

    def _not_json(self) -> NotJson:
        return NotJson(f"the {self._what} is not JSON, from byte {self._before + self._at} on")


def too_many() -> Validation:
    """The error to raise for more than MOST_VALUES."""
    return Validation(
        f"the request has more than {MOST_VALUES} values in all: send its texts in several requests"
    )


async def _rest(done: int) -> None:
    """Let others have their turn after many bytes: all of them may have come."""
    if done > SMALL_BYTES:
        await asyncio.sleep(0)


def _decoded(piece: bytes) -> bytes:
    """What is between the quotes of a string, in UTF-8. Raises NotUtf8, NotJson."""
    try:
        return msgspec.json.decode(b'"%b"' % piece, type=str).encode()
    except UnicodeDecodeError:
        raise NotUtf8 from None
    except msgspec.DecodeError:
        raise NotJson("this is not JSON: an escape in a string is no character") from None
