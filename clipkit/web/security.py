"""Guard: ASGI middleware that protects the application from untrusted requests.

It checks host names, origins and the token, limits the size and duration of requests, and sets
headers that allow a browser to run only the page's own scripts.
"""

import asyncio
import hmac
import json
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipkit.web.schemas import RequestError

MAX_UPLOAD = 20 << 20
"""Maximum size of an uploaded image in bytes."""
MAX_BODY = 1 << 20
"""Maximum size of any other request body in bytes."""
MAX_BUFFERED = 200 << 20
"""Maximum total size of all request bodies in progress, in bytes."""
BODY_SECONDS, SEND_SECONDS = 30.0, 60.0
"""Time limits for receiving a request body and for sending each part of a response."""
COOKIE = "clipkit-token"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_PUBLIC = ("/health", "/static/")  # served without the token
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """Checks every request before it reaches the application.

    Args:
        app: the application.
        hosts: allowed names in the Host header, to prevent DNS rebinding; None allows any.
        token: required as ``Authorization: Bearer``, as a cookie, or once in the page's URL; None
            requires no token.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str] | None, token: str | None) -> None:
        self._app, self._token = app, token
        self._hosts = None if hosts is None else frozenset(hosts)
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it to the application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # websockets are not supported; the server closes them
        send = _with_headers(send)
        headers = Headers(scope=scope)
        body = bytearray()
        try:
            self._check_origin(scope, headers)
            if self._token is not None and not self._is_authorized(scope, headers):
                await self._request_token(scope, send)
                return
            await self._receive_body(scope, headers, receive, body)
            await self._app(scope, _replay(bytes(body), receive), send)
        except RequestError as error:
            await _respond(send, error.status, {"detail": str(error)})
        finally:
            self._buffered -= len(body)

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and _host_name(host) not in self._hosts:
            raise RequestError(
                421,
                f"{host!r} is not a name of this server; use the URL that it printed at startup",
            )
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != host
        # Old browsers and programs send no such header; a foreign page cannot control them.
        site = headers.get("sec-fetch-site", "none")
        opened = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
        if not opened and (foreign or site not in ("same-origin", "none")):
            raise RequestError(
                403, "the request comes from another site; open this server's own page"
            )

    def _is_authorized(self, scope: Scope, headers: Headers) -> bool:
        if scope["path"].startswith(_PUBLIC):
            return True
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        return self._matches(bearer) or self._matches(_cookie(headers.get("cookie", "")))

    def _matches(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self._token or "").encode())

    async def _request_token(self, scope: Scope, send: Send) -> None:
        """Move a token from the page's URL into a cookie, or request one."""
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        given = [value for name, value in query if name == "token"]
        opened = scope["path"] == "/" and scope["method"] == "GET"
        if opened and given and self._matches(given[-1]):
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            cookie = f"{COOKIE}={given[-1]}; Path=/; HttpOnly; SameSite=Lax; Max-Age=31536000"
            location = f"/?{rest}" if rest else "/"
            await _respond(send, 303, {}, {"location": location, "set-cookie": cookie})
        elif opened:
            await _respond(send, 303, {}, {"location": "/static/token.html"})
        else:
            sentence = "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
            await _respond(send, 401, {"detail": sentence}, {"www-authenticate": "Bearer"})

    async def _receive_body(
        self, scope: Scope, headers: Headers, receive: Receive, body: bytearray
    ) -> None:
        """Receive the whole body within size and time limits before any work starts."""
        limit = MAX_UPLOAD if scope["path"] == "/search" else MAX_BODY
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(400, "the connection was cut; send the request again")
                    part = message.get("body", b"")
                    more = message.get("more_body", False)
                    body += part
                    self._buffered += len(part)
                    if len(body) > limit:
                        raise _too_large(limit)
                    if self._buffered > MAX_BUFFERED:
                        raise RequestError(503, "too many uploads are in progress; try again later")
        except TimeoutError:
            sentence = f"the request was incomplete after {BODY_SECONDS:.0f} s; send it faster"
            raise RequestError(408, sentence) from None


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"the request is larger than {limit >> 20} MiB; send a smaller one")


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _cookie(header: str) -> str:
    try:
        cookie = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            given = {name.lower() for name, _ in headers}
            headers += [
                (name.encode(), value.encode())
                for name, value in _HEADERS.items()
                if name.encode() not in given
            ]
            message = {**message, "headers": headers}
        async with asyncio.timeout(SEND_SECONDS):
            await send(message)

    return send_with_headers


async def _respond(
    send: Send, status: int, content: dict[str, str], headers: dict[str, str] | None = None
) -> None:
    body = json.dumps(content).encode() if content else b""
    shown = {"content-length": str(len(body)), "cache-control": "no-store", **(headers or {})}
    if body:
        shown["content-type"] = "application/json"
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in shown.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
