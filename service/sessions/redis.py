"""Sessions in Redis, for gateways on several machines."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from gma.service.errors import StoreFailed, StoreFull
from gma.service.sessions.store import Stored

PREFIX = "gma:"

TIMEOUT_S = 5.0

RETRIES, LEAST_PAUSE_S, MOST_PAUSE_S = 5, 0.05, 1.0
"""A call whose connection was lost, or refused, is made so often again: a Redis that was started
anew is there within a second or two. Each call does the same when it is made twice."""

REPLACE = """
local found = redis.call('HMGET', KEYS[1], 'version', 'call')
if found[2] == ARGV[1] then return 1 end
if found[1] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'call', ARGV[1], 'data', ARGV[3], 'version', ARGV[4],
    'expires_at', ARGV[5])
redis.call('EXPIREAT', KEYS[1], ARGV[6])
return 1
"""
"""One call, so nobody is between the look and the writing. It has a name: where its answer is lost,
it is made again, and what it finds replaced then was replaced by itself."""


class Redis:
    """A `Store`: a hash for each session, which Redis itself removes. What it keeps over its own
    end is what its persistence keeps."""

    def __init__(self, url: str, kept_s: float) -> None:
        """`kept_s`: how long what has expired stays. Raises ValueError for a URL that is none."""
        self._kept_s = kept_s
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # Not one that says nothing: each call waits long enough for that.
            retry=Retry(
                ExponentialBackoff(MOST_PAUSE_S, LEAST_PAUSE_S),
                RETRIES,
                (redis.exceptions.ConnectionError,),
            ),
        )
        self._replace = self._redis.register_script(REPLACE)

    def secret(self) -> bytes:
        with _told():
            self._redis.set(PREFIX + "secret", secrets.token_bytes(32), nx=True)
            found = self._redis.get(PREFIX + "secret")
        if not isinstance(found, bytes):
            raise StoreFailed("the store of sessions, Redis, does not keep what it is given")
        return found

    def create(self, name: str, stored: Stored) -> None:
        with _told(), self._redis.pipeline() as both:
            fields: dict[Any, Any] = {
                "data": stored.data,
                "version": stored.version,
                "expires_at": stored.expires_at,
            }
            both.hset(_key(name), mapping=fields)
            both.expireat(_key(name), self._until(stored))
            both.execute()

    def read(self, name: str) -> Stored | None:
        with _told():
            data, expires_at = self._redis.hmget(_key(name), "data", "expires_at")
        if not isinstance(data, bytes) or expires_at is None:
            return None
        return Stored(data, float(expires_at))

    def replace(self, name: str, version: str, stored: Stored) -> bool:
        with _told():
            new = stored.data, stored.version, stored.expires_at, self._until(stored)
            call = secrets.token_hex(16)
            return bool(self._replace(keys=[_key(name)], args=[call, version, *new]))

    def delete(self, name: str) -> None:
        with _told():
            self._redis.delete(_key(name))

    def sweep(self, now: float) -> None:
        """Redis does it."""

    def _until(self, stored: Stored) -> int:
        return int(stored.expires_at + self._kept_s)


def _key(name: str) -> str:
    return f"{PREFIX}session:{name}"


@contextmanager
def _told() -> Iterator[None]:
    """Redis' errors as the service's own."""
    try:
        yield
    except redis.RedisError as error:
        if isinstance(error, redis.exceptions.OutOfMemoryError) or "OOM" in str(error):
            raise StoreFull from error
        raise StoreFailed(
            "the store of sessions, Redis, can't be used, and the session is as it was: "
            f"{type(error).__name__}"
        ) from error
