"""What is sent between processes arrives as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gma.service import errors
from gma.service.engine.opening import Opening
from gma.service.engine.progress import Progress, RowShares
from gma.service.errors import ServiceError, VersionMismatch
from gma.service.link import messages
from gma.service.link.messages import FEED, HELLO, OPENING, PROGRESS, Feed


def every_error() -> Iterator[ServiceError]:
    arguments = {
        "NotUtf8": (7,),
        "MethodNotAllowed": ("no", "GET"),
        "TooLarge": (5,),
        "WrongOffset": (7,),
        "AllowanceSpent": ("5 documents_per_minute", 9),
    }
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, ServiceError):
            yield kind(*arguments.get(name, ("what is wrong: ü",)))


@pytest.mark.parametrize("error", [*every_error()], ids=lambda error: type(error).__name__)
def test_errors(error: ServiceError) -> None:
    arrived = messages.decode_error(messages.encode_error(error))
    assert (type(arrived), arrived.args, str(arrived)) == (type(error), error.args, str(error))


@pytest.mark.parametrize("name", ["SystemExit", "ClassVar", "__builtins__", "ServiceErr"])
def test_nothing_else_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="is not an error of the service"):
        messages.decode_error(msgspec.msgpack.encode((name, ["x"])))


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("tokens", [[], [0], [2**31 - 1, 5]])
def test_openings_and_feeds(tokens: list[int], running: bool) -> None:
    ids = np.array(tokens, np.int32)
    sent = Opening(
        "ü/1", ids, last=not running, evidence=running, running=running, components=running
    )
    come = OPENING.decode(OPENING.encode(sent))
    assert come._replace(tokens=ids) == sent
    np.testing.assert_array_equal(come.tokens, ids)
    fed = FEED.decode(FEED.encode(Feed(ids[::-1], running)))
    assert fed.last == running
    np.testing.assert_array_equal(fed.tokens, ids[::-1])
    assert come.tokens.dtype == fed.tokens.dtype == np.int32


@given(
    labels=st.integers(1, 5),
    lengths=st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=4),
    seconds=st.floats(0, 1e6),
    tokens=st.integers(0, 2**62),
    seed=st.integers(0, 2**32 - 1),
)
def test_progress(
    labels: int, lengths: list[int] | None, seconds: float, tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shares = None
    if lengths is not None:
        shares = RowShares(
            np.array(lengths, np.int32),
            rng.normal(size=len(lengths)),
            rng.normal(size=(len(lengths), labels)).astype(np.float32),
        )
    usage = rng.normal(size=(2, 3, labels)) if lengths else None
    sent = Progress(tokens, 3, rng.normal(size=labels), shares, seconds, 0.5, 1.5, True, usage)
    come = PROGRESS.decode(PROGRESS.encode(sent))
    assert come._replace(logits=sent.logits, shares=shares, usage=usage) == sent
    assert (come.usage is None) == (usage is None)
    np.testing.assert_array_equal(come.usage, usage)
    np.testing.assert_array_equal(come.logits, sent.logits)
    assert come.logits.dtype == np.float64
    assert (come.shares is None) == (shares is None)
    columns: Any = zip(come.shares or (), shares or (), strict=True)
    for mine, given_ in columns:
        np.testing.assert_array_equal(mine, given_)
        assert (mine.dtype, mine.shape) == (given_.dtype, given_.shape)


@pytest.mark.parametrize("data", [b"", b"\x00", bytes([HELLO[0] + 1])])
def test_another_version_is_not_read(data: bytes) -> None:
    with pytest.raises(VersionMismatch, match="different releases"):
        FEED.decode(data + b"whatever it says")


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\x01\x02"])
def test_what_is_no_message_is_not_read(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        OPENING.decode(HELLO + data)
