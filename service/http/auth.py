"""Who may use the service: requests with an API key, where keys are configured; and who asks."""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network, ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gma.service.errors import MethodNotAllowed, Unauthorized
from gma.service.gateway.admission import Client
from gma.service.http.keys_file import KeysFile
from gma.service.http.middleware import PROBES, RECORD, Record, asked
from gma.service.settings import Settings

OPEN = {*PROBES, "/", "/docs", "/openapi.json"}
"""What anybody may get; every other path and method needs a key."""

PAGE = "/page/"
"""In front of the page's files, which anybody may get too: it asks for a key itself."""

ROOT_POST = ("POST", "/")
"""What is not got, of a path that is open, and has an answer all the same, with a key."""


class Authorized:
    """Lets pass what has an API key, or needs none. The body of anything else is not read."""

    def __init__(self, app: ASGIApp, *, keys: KeysFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises Unauthorized or MethodNotAllowed. By default a route is closed: a new one must not
        be forgotten."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if (path in OPEN or path.startswith(PAGE)) and (scope["method"], path) != ROOT_POST:
            if scope["method"] not in ("GET", "OPTIONS"):
                raise MethodNotAllowed(asked(scope), "GET, HEAD, OPTIONS")
            return
        given = Headers(scope=scope).getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("this needs an API key: send Authorization: Bearer KEY")
        found = self._keys.find(key.strip())
        if not found:
            raise Unauthorized("this API key is not, or no longer, one of the service's")
        record: Record = scope[RECORD]
        record.key = found


def clients_of(scope: Scope, settings: Settings) -> list[Client]:
    """Whose request it is, as far as one client may not hold all there is."""
    clients = []
    key = scope[RECORD].key
    if (share := settings.max_share_per_key) < 1 and key:
        clients.append(Client("key", key.hash, share))
    if (share := settings.max_share_per_address) < 1 and scope["client"]:
        clients.append(Client("address", _network(scope["client"][0]), share))
    return clients


def _network(host: str) -> str:
    """What one client has of addresses: one, or a /64 of IPv6."""
    address = ip_address(host)
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped:  # as who listens on `::` sees those of IPv4, all in one network
        return str(address.ipv4_mapped)
    return str(IPv6Network((int(address), 64), strict=False))
