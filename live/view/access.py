"""Who may ask the server for anything: the browser that has been given this start's secret, and no other page in it.

Every page that a browser has open can send requests to 127.0.0.1. These are refused: those without the secret; those
to a host name that is not this machine's, since a page could point a name of its own to 127.0.0.1 (DNS rebinding); and
those that the browser sends for another origin, such as another local server's.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 << 20
_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Passes requests on to `app` if they have the secret, as `?key=` of the page's address or in the cookie."""

    def __init__(self, app: ASGIApp, secret: str, cookie: str) -> None:
        self._app, self._secret, self._cookie = app, secret.encode(), cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it; connections that are no HTTP requests are closed."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        by_key = self._has_key(scope)
        if reason := self._refusal(scope, headers, by_key):
            await PlainTextResponse(reason + "\n", 403, _HEADERS)(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added.update(_HEADERS)
                if by_key:
                    value = f"{self._cookie}={self._secret.decode()}; HttpOnly; SameSite=Strict; Path=/"
                    added.append("Set-Cookie", value)
            await send(message)

        await self._app(scope, _limited(receive), answer)

    def _has_key(self, scope: Scope) -> bool:
        """Whether the page itself is asked for with the secret in its address."""
        if (scope["method"], scope["path"]) != ("GET", "/"):
            return False
        try:
            given = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=8).get("key", [])
        except ValueError:
            return False
        return len(given) == 1 and self._is_secret(given[0])

    def _refusal(self, scope: Scope, headers: Headers, by_key: bool) -> str | None:
        """Return why a request is refused, or None."""
        hosts = headers.getlist("host")
        host = _host_name(hosts[0]) if len(hosts) == 1 else None
        if host not in _HOSTS:
            return "refused: this server is for 127.0.0.1 only"
        if by_key:
            return None
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "refused: sent by another page"
        if headers.get("origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
            return "refused: sent by another page"
        if not self._has_cookie(headers):
            return "refused: open the address that `view` has printed; it contains this start's key"
        return None

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            found = SimpleCookie("; ".join(headers.getlist("cookie"))).get(self._cookie)
        except CookieError:
            return False
        return found is not None and self._is_secret(found.value)

    def _is_secret(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self._secret)


def _host_name(host: str) -> str | None:
    """Return the name in a Host header; None if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises ValueError if it is no number
        return parts.hostname if parts.netloc == host and parts.username is None else None
    except ValueError:
        return None


def _limited(receive: Receive) -> Receive:
    """Return `receive` that refuses a body of more than `MAX_BODY_BYTES`."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413)
        return message

    return limited
