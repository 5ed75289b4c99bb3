"""GET /: the page that shows a document being read. Its files lie in service/page."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

FOLDER = Path(__file__).parent.parent / "page"

TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}

HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI, prefix: str) -> None:
    """Give `app` the page; `prefix` is the path in front of all routes, or empty."""
    files = {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.suffix in TYPES}

    def answer(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], headers=HEADERS, media_type=TYPES[Path(name).suffix])

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", "").lower():
            return RedirectResponse(f"{prefix}/docs", headers={"vary": "accept"})
        # What the page names is relative to it, so it needs the slash.
        if not request.scope.get("raw_path", b"/").endswith(b"/"):
            return RedirectResponse(f"{prefix}/", headers={"vary": "accept"})
        response = answer("index.html")
        response.headers["vary"] = "accept"
        return response

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return answer(name)
