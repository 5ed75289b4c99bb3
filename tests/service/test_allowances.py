"""Allowances of API keys: what is refused, until when, and what of it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from gma.service.errors import AllowanceSpent, NotReady, Overloaded
from gma.service.gateway.admission import Admission
from gma.service.gateway.allowance import UNLIMITED, Allowance, Key
from gma.service.gateway.spending import Spending
from gma.service.http import keys_file
from gma.service.http.keys import Keys, hash_of
from gma.service.link.messages import decode_error, encode_error
from gma.service.settings import Settings, SettingsError
from tests.service.asgi import Exchange, Service
from tests.service.test_keys import bearer, gma_key

pytestmark = pytest.mark.anyio

PATH, PLAIN = "/v1/documents", {"content-type": "text/plain"}
DAY_S = 86400.0


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key_of(**allowed: Any) -> Key:
    return Key("a" * 64, "team", Allowance(**allowed))


class TestSpending:
    @pytest.fixture
    def admission(self, checkpoint: Path, clock: Clock) -> Admission:
        settings = Settings.load(
            checkpoint=checkpoint, max_document_bytes=1000, max_bytes_in_flight=1000
        )
        return Admission(settings, Spending(clock=clock))

    def taken(self, admission: Admission, key: Key, size: int = 1) -> int | None:
        """None if a document of `key` was taken, else the seconds it was told to wait."""
        try:
            with admission.admit(key=key) as admitted:
                admitted.count(size)
        except AllowanceSpent as error:
            return error.retry_after_s
        return None

    @pytest.mark.parametrize("rate", [1, 7, 60, 0.25, 6000])
    def test_so_many_documents_and_one_when_it_has_come_back(
        self, admission: Admission, clock: Clock, rate: float
    ) -> None:
        key = key_of(documents_per_minute=rate)
        for _ in range(max(1, int(rate))):
            assert self.taken(admission, key) is None
        wait = self.taken(admission, key)
        assert wait == -(-60 // rate)
        clock.now += 60 / rate
        assert self.taken(admission, key) is None
        assert self.taken(admission, key) == wait
        clock.now += wait
        assert self.taken(admission, key) is None

    def test_rest_earns_a_window_and_no_more(self, admission: Admission, clock: Clock) -> None:
        key = key_of(documents_per_minute=3)
        assert self.taken(admission, key) is None
        clock.now += 30 * DAY_S
        assert [self.taken(admission, key) for _ in range(5)] == [None, None, None, 20, 20]

    def test_what_is_refused_costs_nothing(self, admission: Admission, clock: Clock) -> None:
        key = key_of(documents_per_minute=1)
        with (
            pytest.raises(Overloaded),
            admission.admit(1000),
            admission.admit(1, key=key),
        ):
            pass
        assert self.taken(admission, key) is None
        for _ in range(9):
            assert self.taken(admission, key) == 60
        clock.now += 60
        assert self.taken(admission, key) is None

    def test_the_document_in_which_bytes_run_out_is_read_and_the_next_waits_for_it(
        self, admission: Admission, clock: Clock
    ) -> None:
        key = key_of(bytes_per_day=100)
        with admission.admit(key=key) as admitted:
            for _ in range(15):
                admitted.count(10)
        # 50 more than there are, and one to begin with.
        assert self.taken(admission, key) == 51 * DAY_S / 100
        clock.now += 51 * DAY_S / 100
        assert self.taken(admission, key) is None

    def test_bytes_count_while_they_come(self, admission: Admission) -> None:
        key = key_of(bytes_per_day=100)
        with admission.admit(key=key) as admitted:
            admitted.count(99)
            assert self.taken(admission, key, size=0) is None
            admitted.count(1)
            assert self.taken(admission, key) == DAY_S / 100

    def test_gateways_together_keep_to_it(self, clock: Clock) -> None:
        key, waits = key_of(documents_per_minute=60), []
        for spending in [Spending(4, clock) for _ in range(4)]:
            for _ in range(15):
                spending.check(key)
                spending.add(key, documents=1)
            with pytest.raises(AllowanceSpent) as raised:
                spending.check(key)
            waits.append(raised.value.retry_after_s)
        assert waits == [4] * 4

    def test_a_gateways_part_is_one_at_least(self, clock: Clock) -> None:
        key, spending = key_of(documents_per_minute=1), Spending(8, clock)
        spending.check(key)
        spending.add(key, documents=1)
        with pytest.raises(AllowanceSpent) as raised:
            spending.check(key)
        assert raised.value.retry_after_s == 8 * 60

    def test_keys_have_their_own(self, admission: Admission) -> None:
        one = key_of(documents_per_minute=1)
        other = one._replace(hash="b" * 64)
        assert [self.taken(admission, key) for key in (one, one, other)] == [None, 60, None]

    def test_another_allowance_counts_from_now_on(self, admission: Admission) -> None:
        one = key_of(documents_per_minute=1)
        assert [self.taken(admission, one) for _ in range(2)] == [None, 60]
        assert self.taken(admission, one._replace(allowance=UNLIMITED)) is None
        assert self.taken(admission, one) == 60

    def test_its_error_crosses_processes(self) -> None:
        error = decode_error(encode_error(AllowanceSpent("60 documents_per_minute", 7)))
        assert (error.status, error.headers) == (429, {"retry-after": "7"})
        assert str(error) == (
            "this API key's allowance of 60 documents_per_minute is spent: try again in 7 s"
        )

    def test_what_is_refused_for_no_fault_of_the_client_is_given_back(
        self, admission: Admission
    ) -> None:
        key = key_of(documents_per_minute=1, bytes_per_day=5)
        for error in (Overloaded("full", 1), NotReady("none")):
            with suppress(type(error)), admission.admit(key=key) as admitted:
                admitted.count(100)
                raise error
        assert self.taken(admission, key) is None
        assert self.taken(admission, key)


class TestFile:
    @pytest.fixture
    def load(self, tmp_path: Path) -> Callable[..., Allowance]:
        def load(words: str, **default: Any) -> Allowance:
            file = tmp_path / "keys"
            file.write_text(f"{hash_of('a')} {words}\n")
            found = Keys.load(file, Allowance(**default)).find("a")
            assert found
            return found.allowance

        return load

    def test_has_what_a_key_is_allowed(self, load: Callable[..., Allowance]) -> None:
        default = {"documents_per_minute": 6, "bytes_per_day": 9}
        assert load("# team", **default) == Allowance(**default)
        given = load("documents_per_minute=0.5 bytes_per_day=1GiB  # team", **default)
        assert given == Allowance(documents_per_minute=0.5, bytes_per_day=2**30)
        assert load("bytes_per_day=0", **default) == Allowance(documents_per_minute=6)

    @pytest.mark.parametrize(
        "words",
        [
            "gma_a-key-itself",
            "documents_per_minute=-1",
            "documents_per_minute=nan",
            "documents_per_minute=",
            "documents_per_minute=1=2",
            "documents_per_minute=1 documents_per_minute=2",
            "bytes_per_day=1XB",
            "bytes_per_day=1 GiB",
            "bytes_per_hour=1",
        ],
    )
    def test_a_mistake_is_refused_and_not_told(
        self, load: Callable[..., Allowance], words: str
    ) -> None:
        with pytest.raises(ValueError, match="keys:1 has more than a hash") as raised:
            load(words)
        assert "gma_a-key" not in str(raised.value)

    def test_the_command_writes_it(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        limits = ("--documents-per-minute", 7.5, "--bytes-per-day", "3MiB")
        (key,) = gma_key(file, "--name", "trial", *limits)
        found = Keys.load(file).find(key)
        assert found
        assert found.name == "trial"
        assert found.allowance == Allowance(documents_per_minute=7.5, bytes_per_day=3 * 2**20)

    @pytest.mark.parametrize("limit", ["key_documents_per_minute", "key_bytes_per_day"])
    def test_a_default_without_keys_stops_the_start(self, checkpoint: Path, limit: str) -> None:
        with pytest.raises(SettingsError, match="need GMA_API_KEYS_FILE"):
            Settings.load(checkpoint=checkpoint, **{limit: 1})


class TestRoute:
    @pytest.fixture
    async def limited(
        self, checkpoint: Path, tmp_path: Path, clock: Clock
    ) -> AsyncIterator[Service]:
        file = tmp_path / "keys"
        own = "documents_per_minute=0 bytes_per_day=10  # own"
        file.write_text(f"{hash_of('some')}  # some\n{hash_of('own')} {own}\n")
        async with Service(checkpoint, api_keys_file=file, key_documents_per_minute=2) as service:
            service.gateway.admission.spending = Spending(clock=clock)
            yield service

    async def post(self, service: Service, key: str, text: str = "a") -> httpx.Response:
        headers = {**PLAIN, **bearer(key)}
        return await service.http.post(PATH, content=text, headers=headers)

    async def test_a_key_that_has_spent_its_allowance_is_told_when_to_come_back(
        self, limited: Service, clock: Clock
    ) -> None:
        for _ in range(2):
            assert (await self.post(limited, "some")).status_code == 200
        refused = await self.post(limited, "some")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
        assert refused.json()["error_type"] == "AllowanceSpent"
        assert "2 documents_per_minute" in refused.json()["error"]
        assert (await self.post(limited, "own")).status_code == 200
        assert (await limited.http.get("/info", headers=bearer("some"))).status_code == 200
        clock.now += 30
        assert (await self.post(limited, "some")).status_code == 200

    async def test_a_document_of_unknown_length_is_not_cut(
        self, limited: Service, clock: Clock
    ) -> None:
        headers = {**PLAIN, **bearer("own")}
        async with Exchange(limited.app, PATH, headers) as exchange:
            for _ in range(3):
                exchange.send(b"a" * 10)
            exchange.send(b"", last=True)
            assert (await exchange.head())[0] == 200
        refused = await self.post(limited, "own")
        assert refused.headers["retry-after"] == str(int(21 * DAY_S / 10))
        clock.now += 21 * DAY_S / 10
        assert (await self.post(limited, "own")).status_code == 200

    async def test_is_refused_before_its_body_comes(self, limited: Service) -> None:
        await self.post(limited, "own", "a" * 10)
        async with Exchange(limited.app, PATH, {**PLAIN, **bearer("own")}) as exchange:
            assert (await exchange.head())[0] == 429

    async def test_refusals_are_counted_by_the_keys_name(self, limited: Service) -> None:
        samples = (
            'gma_key_refusals_total{key="own",limit="bytes_per_day"}',
            'gma_refusals_total{reason="allowance"}',
        )

        async def counts() -> list[float]:
            lines = (await limited.http.get("/metrics")).text.splitlines()
            found = dict(line.rsplit(" ", 1) for line in lines)
            return [float(found.get(sample, 0)) for sample in samples]

        before = await counts()
        await self.post(limited, "own", "a" * 10)
        assert await counts() == before
        await self.post(limited, "own")
        assert await counts() == [count + 1 for count in before]

    async def test_another_allowance_in_the_file_needs_no_restart(
        self, limited: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(keys_file, "LOOK_S", 0.0)
        await self.post(limited, "own", "a" * 10)
        assert (await self.post(limited, "own")).status_code == 429
        file = limited.settings.api_keys_file
        assert file
        file.write_text(f"{hash_of('own')} bytes_per_day=20\n")
        assert (await self.post(limited, "own")).status_code == 200
