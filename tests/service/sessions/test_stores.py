"""Stores of sessions: what was written stays, and of several writers one wins."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gma.service.errors import StoreFailed, StoreFull
from gma.service.sessions.choice import store_of
from gma.service.sessions.directory import Directory
from gma.service.sessions.store import Store, Stored
from gma.service.settings import Settings

NAME, OTHER = "ab" * 32, "cd" * 32
KEPT_S = 100.0
PATIENCE_S = 20


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """Of a server of our own, on loopback."""
    pytest.importorskip("redis", reason="needs the package redis")
    if not shutil.which("redis-server"):
        pytest.skip("needs redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(
        ["redis-server", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.stdout
        assert any("Ready to accept connections" in line for line in server.stdout)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(PATIENCE_S)


@pytest.fixture(params=["directory", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "directory":
        return Settings.load(sessions=tmp_path / "store", session_ttl_s=KEPT_S)
    url: str = request.getfixturevalue("redis_url")
    import redis

    redis.Redis.from_url(url).flushdb()
    return Settings.load(sessions=url, session_ttl_s=KEPT_S)


def opened(settings: Settings) -> Store:
    store = store_of(settings)
    assert store
    return store


@pytest.fixture
def store(settings: Settings) -> Store:
    return opened(settings)


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
    assert store.delete(NAME)
    assert not opened(settings).delete(NAME)
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
    def test_that_is_not_there(self) -> None:
        pytest.importorskip("redis", reason="needs the package redis")
        store = opened(Settings.load(sessions="redis://127.0.0.1:1/0"))
        with pytest.raises(StoreFailed, match="ConnectionError"):
            store.read(NAME)

    def test_that_is_full(self, redis_url: str) -> None:
        import redis

        store, first = opened(Settings.load(sessions=redis_url)), stored(b"first")
        store.create(NAME, first)
        client = redis.Redis.from_url(redis_url)
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
