"""Stores of sessions: what was written stays, and of several writers one wins."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gma.service.errors import StoreFailed, StoreFull
from gma.service.sessions.choice import store_of
from gma.service.sessions.directory import Directory
from gma.service.sessions.store import Store, Stored
from gma.service.settings import Settings
from tests.service.sessions.failing import read_only
from tests.service.sessions.redis import PATIENCE_S, RedisServer

NAME, OTHER = "ab" * 32, "cd" * 32
KEPT_S = 100.0


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    pytest.importorskip("redis", reason="needs the package redis")
    if not shutil.which("redis-server"):
        pytest.skip("needs redis-server")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(params=["directory", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "directory":
        return Settings.load(sessions=tmp_path / "store", session_ttl_s=KEPT_S)
    server: RedisServer = request.getfixturevalue("redis_server")
    import redis

    redis.Redis.from_url(server.url).flushdb()
    return Settings.load(sessions=server.url, session_ttl_s=KEPT_S)


def opened(settings: Settings) -> Store:
    store = store_of(settings)
    assert store
    return store


@pytest.fixture
def store(settings: Settings) -> Store:
    return opened(settings)


def of_redis(server: RedisServer) -> Store:
    return opened(Settings.load(sessions=server.url, session_ttl_s=KEPT_S))


def stored(data: bytes, expires_in: float = 50.0) -> Stored:
    return Stored(data, float(int(time.time() + expires_in)))


def test_what_is_written_is_read_by_any_other(settings: Settings, store: Store) -> None:
    first, second = stored(b"a\0b"), stored(b"", 70)
    assert store.read(NAME) is None
    store.create(NAME, first)
    assert opened(settings).read(NAME) == first
    assert store.read(OTHER) is None
    assert opened(settings).replace(NAME, first.version, second)
    assert store.read(NAME) == second
    for _ in range(2):
        opened(settings).delete(NAME)
        assert store.read(NAME) is None


def test_only_what_was_read_is_replaced(store: Store) -> None:
    first, second, third = map(stored, (b"1", b"2", b"3"))
    assert not store.replace(NAME, first.version, second)
    assert store.read(NAME) is None
    store.create(NAME, first)
    assert store.replace(NAME, first.version, second)
    assert not store.replace(NAME, first.version, third)
    assert store.read(NAME) == second


def test_what_has_expired_is_read_for_a_while(store: Store) -> None:
    expired, long_ago = stored(b"a", -50), stored(b"b", -150)
    store.create(NAME, expired)
    store.create(OTHER, long_ago)
    store.sweep(time.time())
    assert store.read(NAME) == expired
    assert store.read(OTHER) is None


def test_the_secret_is_the_same_for_all(settings: Settings) -> None:
    found: set[bytes] = set()
    threads = [
        threading.Thread(target=lambda: found.add(opened(settings).secret())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (secret,) = found
    assert len(secret) == 32


def count_up(settings: Settings, times: int) -> None:
    store = opened(settings)
    while times:
        found = store.read(NAME)
        assert found
        times -= store.replace(NAME, found.version, stored(b"%d" % (int(found.data) + 1)))


def test_of_writers_in_several_processes_one_wins_each_time(
    settings: Settings, store: Store
) -> None:
    store.create(NAME, stored(b"0"))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=count_up, args=(settings, 20)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(PATIENCE_S)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    found = store.read(NAME)
    assert found
    assert found.data == b"60"


class TestDirectory:
    def test_that_can_only_be_read_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, first = tmp_path / "store", stored(b"first")
        store = Directory(folder, KEPT_S)
        store.create(NAME, first)
        secret = store.secret()
        with monkeypatch.context() as patch:
            read_only(patch, folder)
            again = Directory(folder, KEPT_S)
            assert (again.secret(), again.read(NAME)) == (secret, first)
            for write in (
                lambda: again.create(OTHER, first),
                lambda: again.replace(NAME, first.version, stored(b"second")),
                lambda: again.delete(NAME),
            ):
                with pytest.raises(StoreFailed, match="Read-only"):
                    write()
        assert store.read(NAME) == first
        assert store.read(OTHER) is None

    def test_is_for_its_owner_alone(self, tmp_path: Path) -> None:
        folder = tmp_path / "below" / "store"
        store = Directory(folder, KEPT_S)
        store.create(NAME, stored(b"a"))
        store.secret()
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert modes.pop("locks") == folder.stat().st_mode & 0o777 == 0o700
        assert {*modes.values()} == {0o600}
        assert len(modes) == 2

    def test_a_writer_that_died_leaves_what_was_before(self, tmp_path: Path) -> None:
        folder = tmp_path / "store"
        store, first = Directory(folder, KEPT_S), stored(b"first")
        store.create(NAME, first)
        pid = os.fork()
        if not pid:
            os.fsync = lambda _: os._exit(7)  # type: ignore[assignment]
            store.replace(NAME, first.version, stored(b"second"))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert store.read(NAME) == first
        assert store.replace(NAME, first.version, stored(b"third"))  # its lock is free
        assert len([*folder.glob(".new-*")]) == 1
        store.sweep(time.time() + 1000)
        assert not [*folder.glob(".new-*")]

    def test_a_place_that_is_a_file_stops_the_start(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"can't be kept in .* GMA_SESSIONS chooses another"):
            store_of(Settings.load(sessions=tmp_path / "file"))


class TestRedis:
    def test_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("redis", reason="needs the package redis")
        monkeypatch.setattr("gma.service.sessions.redis.LEAST_PAUSE_S", 0)
        store = opened(Settings.load(sessions="redis://127.0.0.1:1/0"))
        with pytest.raises(StoreFailed, match="ConnectionError"):
            store.read(NAME)

    def test_that_was_killed_has_all_that_it_was_given(self, redis_server: RedisServer) -> None:
        store, first, second = of_redis(redis_server), stored(b"first"), stored(b"second")
        secret = store.secret()
        store.create(NAME, first)
        redis_server.kill()
        assert store.read(NAME) == first
        redis_server.kill()
        assert store.replace(NAME, first.version, second)
        redis_server.kill()
        assert store.read(NAME) == second
        assert store.secret() == secret

    def test_whose_answer_is_lost_has_done_it_once(
        self, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import redis
        from redis.connection import AbstractConnection

        store, first, second = of_redis(redis_server), stored(b"first"), stored(b"second")
        store.create(NAME, first)
        assert not store.replace(NAME, second.version, second)  # the script is there
        read, answers = AbstractConnection.read_response, 0

        def lose(self: AbstractConnection, *given: Any, **options: Any) -> Any:
            nonlocal answers
            answer, answers = read(self, *given, **options), answers + 1
            if answers == 1:
                raise redis.ConnectionError
            return answer

        monkeypatch.setattr(AbstractConnection, "read_response", lose)
        assert store.replace(NAME, first.version, second)
        assert answers > 1
        assert not store.replace(NAME, first.version, stored(b"third"))
        assert store.read(NAME) == second

    def test_that_is_full(self, redis_server: RedisServer) -> None:
        import redis

        store, first = of_redis(redis_server), stored(b"first")
        store.delete(OTHER)
        store.create(NAME, first)
        client = redis.Redis.from_url(redis_server.url)
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(StoreFull):
                store.replace(NAME, first.version, stored(b"second"))
            with pytest.raises(StoreFull):
                store.create(OTHER, first)
        finally:
            client.config_set("maxmemory", 0)
        assert store.read(NAME) == first
        assert store.read(OTHER) is None
