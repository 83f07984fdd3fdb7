"""The page at `/`: its files, and headers that let it load nothing from elsewhere."""

from __future__ import annotations

import functools
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_SCRIPTS = ("page.js", "recorder.js", "sound.js", "times.js", "view.js")
FILES = {  # path -> name, type
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in _SCRIPTS},
}
HEADERS = {
    # The sound that is played is a blob, the icon an empty `data:` URL.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; media-src 'self' blob:; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    """One of the page's files. They hold no secret, so they are given without a key."""
    name, kind = FILES[request.scope["path"]]
    return Response(_read(name), 200, HEADERS, f"{kind}; charset=utf-8")


@functools.cache
def _read(name: str) -> bytes:
    return (Path(__file__).parent / "page" / name).read_bytes()
