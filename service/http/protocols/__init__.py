"""Other servers' protocols: each a module that reads a request, renders the answer, and tells
errors as its own server does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI

from gma.service.gateway.gateway import Gateway
from gma.service.http.middleware import ErrorForm
from gma.service.http.protocols import hugging_face, tei, v2, vllm

FORMS: dict[str, ErrorForm] = {
    **dict.fromkeys(tei.PATHS, tei.failure),
    **dict.fromkeys(vllm.PATHS, vllm.failure),
    hugging_face.PATH: hugging_face.failure,
    v2.PATH: v2.failure,
}
"""How errors are told, by path."""


def add(app: FastAPI, gateway: Gateway, check_ready: Callable[[], Awaitable[None]]) -> None:
    """Give `app` the routes of all of them. `check_ready` raises Unavailable."""
    tei.add(app, gateway)
    hugging_face.add(app, gateway)
    vllm.add(app, gateway)
    v2.add(app, gateway, check_ready)
