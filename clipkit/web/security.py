"""Requests that are refused: each with its HTTP status and one sentence.

Guard: what stands between the network and the application.

It refuses strangers, bounds what is sent, and puts on every answer what tells a browser to run
nothing but the page's own script.
"""

import asyncio
import hmac
import json
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipkit.errors import ServeError


class RequestError(ServeError):
    """A request is refused.

    Attributes:
        status: the HTTP status of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


MAX_UPLOAD = 20 << 20
"""Bytes of a picture that is sent."""
MAX_BODY = 1 << 20
"""Bytes of any other request."""
MAX_HELD = 200 << 20
"""Bytes of all requests under way together."""
BODY_SECONDS, ANSWER_SECONDS = 30.0, 60.0
"""How long a request may take to be sent, and each part of an answer to be taken."""
COOKIE = "clipkit-token"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_OPEN = ("/health", "/static/")  # what a person without the token may see
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
    """An ASGI application around another.

    Args:
        app: the other.
        hosts: names that a request may call this server by, which keeps a foreign page from
            reaching it under a name of its own that it points here; None: any.
        token: what a request must show, as ``Authorization: Bearer``, in a cookie, or once in the
            page's address; None: nothing.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str] | None, token: str | None) -> None:
        self._app, self._token = app, token
        self._hosts = None if hosts is None else frozenset(hosts)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websocket is spoken here; the server closes it
        guarded = _guarded(send)
        headers = Headers(scope=scope)
        held = bytearray()
        try:
            self._check_origin(scope, headers)
            if self._token is not None and not self._is_known(scope, headers):
                await self._ask_for_token(scope, guarded)
                return
            await self._hold(scope, headers, receive, held)
            await self._app(scope, _replay(bytes(held), receive), guarded)
        except RequestError as error:
            await _answer(guarded, error.status, {"detail": str(error)})
        finally:
            self._held -= len(held)

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            raise RequestError(
                421, f"this server is not called {host!r}; use the address it printed when started"
            )
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != host
        # Absent from old browsers and from programs, which no foreign page can make use of.
        asked_by = headers.get("sec-fetch-site", "none")
        opened = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
        if not opened and (foreign or asked_by not in ("same-origin", "none")):
            raise RequestError(403, "another site's page asks for this; open the page itself")

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        if scope["path"].startswith(_OPEN):
            return True
        shown = headers.get("authorization", "").removeprefix("Bearer ")
        return self._fits(shown) or self._fits(_cookie(headers.get("cookie", "")))

    def _fits(self, shown: str) -> bool:
        return hmac.compare_digest(shown.encode(), (self._token or "").encode())

    async def _ask_for_token(self, scope: Scope, send: Send) -> None:
        """Take the token from the page's address into a cookie, or say that it is missing."""
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        given = [value for name, value in query if name == "token"]
        opened = scope["path"] == "/" and scope["method"] == "GET"
        if opened and given and self._fits(given[-1]):
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            cookie = f"{COOKIE}={given[-1]}; Path=/; HttpOnly; SameSite=Lax; Max-Age=31536000"
            place = f"/?{rest}" if rest else "/"
            await _answer(send, 303, {}, {"location": place, "set-cookie": cookie})
        elif opened:
            await _answer(send, 303, {}, {"location": "/static/token.html"})
        else:
            sentence = "this server asks for its token; send it as Authorization: Bearer TOKEN"
            await _answer(send, 401, {"detail": sentence}, {"www-authenticate": "Bearer"})

    async def _hold(
        self, scope: Scope, headers: Headers, receive: Receive, held: bytearray
    ) -> None:
        """Read the whole request, within bounds of size and time, before anybody works on it."""
        most = MAX_UPLOAD if scope["path"] == "/search" else MAX_BODY
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(400, "the request broke off; send it again")
                    part = message.get("body", b"")
                    more = message.get("more_body", False)
                    held += part
                    self._held += len(part)
                    if len(held) > most:
                        raise _too_large(most)
                    if self._held > MAX_HELD:
                        raise RequestError(503, "too much is being sent here; try again later")
        except TimeoutError:
            sentence = f"the request was not complete after {BODY_SECONDS:.0f} s; send it faster"
            raise RequestError(408, sentence) from None


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"the request has more than {most >> 20} MiB; send a smaller one")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
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


def _guarded(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            given = {name.lower() for name, _ in headers}
            headers += [
                (name.encode(), value.encode())
                for name, value in _HEADERS.items()
                if name.encode() not in given
            ]
            message = {**message, "headers": headers}
        async with asyncio.timeout(ANSWER_SECONDS):
            await send(message)

    return guarded


async def _answer(
    send: Send, status: int, content: dict[str, str], headers: dict[str, str] | None = None
) -> None:
    body = json.dumps(content).encode() if content else b""
    shown = {"content-length": str(len(body)), "cache-control": "no-store", **(headers or {})}
    if body:
        shown["content-type"] = "application/json"
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in shown.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
