"""Whose request it is, by address."""

from __future__ import annotations

from pathlib import Path

import pytest

from gma.service.http.auth import clients_of
from gma.service.http.middleware import RECORD, Record
from gma.service.settings import Settings


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),  # as who listens on :: sees it
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_one_address_of_ipv4_or_a_network_of_ipv6(checkpoint: Path, host: str, name: str) -> None:
    settings = Settings.load(checkpoint=checkpoint, max_share_per_address=0.5)
    (client,) = clients_of({"client": (host, 1), RECORD: Record("x")}, settings)
    assert (client.kind, client.name) == ("address", name)
