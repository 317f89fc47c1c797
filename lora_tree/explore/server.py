"""The explorer's server: pages on 127.0.0.1, started and stopped as a block.

    browser ─▶ LoopbackOnly ─▶ /             the page of the tree
                            └▶ /playground   gradio, if there is a model to ask

Laws: it listens on 127.0.0.1 alone; it answers only requests that were addressed to it by that
name, so that a page from another site can't reach it by a name that resolves to this machine (DNS
rebinding); and every answer forbids the browser to load anything from another place.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from ..errors import StateError
from ..extras import need
from .playground import Playground, mount

__all__ = ["PLAYGROUND_PATH", "LoopbackOnly", "Served", "serving"]

HOST = "127.0.0.1"
PLAYGROUND_PATH = "/playground/"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
GRACE_S = 1
"""Seconds that an open connection may last when the server stops; gradio's never end themselves."""

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "form-action 'self'; frame-ancestors 'self'; base-uri 'self'"
)
"""The Content-Security-Policy: a browser loads and sends nothing anywhere else."""

OPEN_PATHS = (
    "/playground/",
    "/playground/config",
    "/playground/theme.css",
    "/playground/manifest.json",
)
OPEN_FOLDERS = (
    "/playground/assets/",
    "/playground/static/",
    "/playground/gradio_api/queue/",
    "/playground/gradio_api/heartbeat/",
    "/playground/gradio_api/startup-events",
)
"""All of gradio that the playground needs. Its routes for files and uploads stay closed."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Served:
    """The address of a running server."""

    port: int

    @property
    def url(self) -> str:
        """The address of the tree's page; the playground is at ``url + "playground/"``."""
        return f"http://{HOST}:{self.port}/"


@contextlib.contextmanager
def serving(
    page: Callable[[], str], *, playground: Playground | None = None, port: int | None = None
) -> Iterator[Served]:
    """Serve the explorer on 127.0.0.1 for the length of a ``with``.

    Args:
        page: returns the HTML of the first page; called at each request.
        playground: the playground at ``/playground/``; None: there is none.
        port: to listen on; None: a free one.

    Raises:
        MissingExtra: fastapi, uvicorn or gradio is not installed.
        StateError: the port is taken, or the server did not start.

    >>> from urllib.request import urlopen
    >>> with serving(lambda: "<p>a tree</p>") as served:
    ...     urlopen(served.url).read()
    b'<p>a tree</p>'
    """
    uvicorn = need("uvicorn", extra="explore", what="lora-tree explore")
    app = _app(page, playground)
    listening = _listen(port)
    served = Served(listening.getsockname()[1])
    config = uvicorn.Config(
        LoopbackOnly(app, served.port),
        log_level="error",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=GRACE_S,
    )
    server = uvicorn.Server(config)
    # Run in a thread, so that the block's own thread gets Ctrl-C, and leaves the block by it.
    thread = threading.Thread(
        target=server.run, args=([listening],), name="lora_tree server", daemon=True
    )
    with listening:
        thread.start()
        try:
            _wait_until_started(server, thread)
            yield served
        finally:
            # Stopped first: an answer that is being written would keep its connection open.
            if playground is not None:
                playground.stop()
            server.should_exit = True
            thread.join(STOP_TIMEOUT_S)


def _listen(port: int | None) -> socket.socket:
    """Return a listening socket: another process could take a port that was merely chosen."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port or 0))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise StateError(
            f"can't listen on {HOST}:{port}: {error}", "name another port, or none for a free one"
        ) from error
    return listening


def _wait_until_started(server: Any, thread: threading.Thread) -> None:
    tick = threading.Event()  # never set: it only waits
    waited_s = 0.0
    while not server.started:
        if not thread.is_alive() or waited_s >= START_TIMEOUT_S:
            raise StateError(f"the server did not start within {START_TIMEOUT_S:g} s")
        tick.wait(0.02)
        waited_s += 0.02


def _app(page: Callable[[], str], playground: Playground | None) -> Any:
    fastapi = need("fastapi", extra="explore", what="lora-tree explore")
    responses = need("fastapi.responses", extra="explore", what="lora-tree explore")
    # Without FastAPI's documentation pages, which load scripts from a CDN.
    app = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    def first_page() -> Any:
        return responses.HTMLResponse(page())

    def no_icon() -> Any:
        return fastapi.Response(status_code=204)

    app.add_api_route("/", first_page, methods=["GET"])
    # Browsers request an icon by themselves, and would log its absence as an error.
    app.add_api_route("/favicon.ico", no_icon, methods=["GET"])
    if playground is not None:
        mount(app, playground)
    return app


class LoopbackOnly:
    """An ASGI application that enforces the laws above in front of another one.

    Args:
        app: answers the requests that are let through.
        port: the one that the server listens on.
    """

    def __init__(self, app: App, port: int) -> None:
        self._app = app
        self._hosts = {f"{HOST}:{port}".encode(), f"localhost:{port}".encode()}
        self._origins = {b"http://" + host for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and self._is_allowed(scope):
            await self._app(scope, receive, _with_policy(send))
        elif scope["type"] == "http":
            start = {"type": "http.response.start", "status": 404, "headers": []}
            await send(start)
            await send({"type": "http.response.body", "body": b"not here\n"})
        # A websocket is not accepted, and the server closes it.

    def _is_allowed(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        if headers.get(b"host") not in self._hosts:
            return False
        # A browser sends the origin of a request, except for a plain GET from the same origin.
        origin = headers.get(b"origin")
        if origin is not None and origin not in self._origins:
            return False
        path = scope["path"]
        if not path.startswith("/playground"):
            return True
        return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _with_policy(send: Send) -> Send:
    """Return a ``send`` that adds the policy to an answer's headers."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            headers.append((b"content-security-policy", POLICY.encode()))
            headers.append((b"x-content-type-options", b"nosniff"))
            headers.append((b"referrer-policy", b"no-referrer"))
            message["headers"] = headers
        await send(message)

    return sending
