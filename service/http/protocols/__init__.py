"""Other servers' protocols: each a module that reads a request, renders the answer, and tells
errors as its own server does."""

from __future__ import annotations

import re

from fastapi import FastAPI

from gma.service.gateway.gateway import Gateway
from gma.service.http.middleware import ErrorForm
from gma.service.http.protocols import hugging_face, tei, v2, vllm
from gma.service.http.readiness import Readiness

FORMS: dict[str, ErrorForm] = {
    **dict.fromkeys(tei.PATHS, tei.failure),
    **dict.fromkeys(vllm.PATHS, vllm.failure),
    hugging_face.PATH: hugging_face.failure,
    v2.PATH: v2.failure,
}
"""How errors are told, by path."""

OF_MODEL = re.compile("/models/[^/]+")


def form_of(path: str) -> ErrorForm | None:
    """How errors are told at a path, with or without a model in front; None if as ours are."""
    path = OF_MODEL.sub("", path, count=1) or "/" if OF_MODEL.match(path) else path
    return FORMS.get(path) or FORMS.get("/" + path[1:].partition("/")[0])


def add(app: FastAPI, gateway: Gateway, check_ready: Readiness) -> None:
    """Give `app` the routes of all of them."""
    tei.add(app, gateway)
    hugging_face.add(app, gateway)
    vllm.add(app, gateway)
    v2.add(app, gateway, check_ready)
