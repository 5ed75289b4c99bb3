"""Who may use the service: requests with an API key, where keys are configured."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gma.service.errors import Unauthorized
from gma.service.http.keys import Keys
from gma.service.http.middleware import PROBES

OPEN = {*PROBES, "/", "/docs", "/openapi.json"}
"""What anybody may get; every other path and method needs a key."""


class Authorized:
    """Lets pass what has an API key, or needs none. The body of anything else is not read."""

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises Unauthorized. By default a route is closed: a new one must not be forgotten."""
        if scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN:
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("this needs an API key: send Authorization: Bearer KEY")
        if not self._keys.allow(key.strip()):
            raise Unauthorized("this API key is not, or no longer, one of the service's")
