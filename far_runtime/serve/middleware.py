"""What stands before the application: a limit on the size and the time of a request's body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


NO_KEY = "no key, or an unknown one; send Authorization: Bearer KEY"


class BodyGuard:
    """Reads a request's body before the application sees it: at most `most` bytes (else 413), or those that `of` has
    for its path, within `seconds` (else 408), so that neither a large body nor a slow one takes a place. refused: told
    of the reason."""

    def __init__(
        self, app: App, most: int, of: Mapping[str, int], seconds: float, refused: Callable[[str], None]
    ) -> None:
        self.app, self.most, self.of, self.seconds, self.refused = app, most, of, seconds, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        most = self.of.get(scope["path"], self.most)
        try:
            body = await asyncio.wait_for(self._body(scope, receive, most), self.seconds)
        except asyncio.TimeoutError:
            self.refused("slow_body")
            await refuse(send, 408, "slow_body", f"the body did not come within {self.seconds:g} s; send it faster")
            return
        if body is None:
            self.refused("large_body")
            await refuse(send, 413, "large_body", f"the body has more than {most} bytes; send less")
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # the client leaves
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _body(self, scope: Scope, receive: Receive, most: int) -> bytes | None:
        """The whole body; None where it is too large. What came before a client left is what came."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > most:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > most:
                return None
        return b"".join(parts)


class KeyGuard:
    """Reads no body of a request under /v1 that has no right key. known: whether a key is one; refused: told of the
    reason."""

    def __init__(self, app: App, known: Callable[[str], bool], refused: Callable[[str], None]) -> None:
        self.app, self.known, self.refused = app, known, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and scope["method"] not in ("GET", "HEAD"):
            kind, _, key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
            if kind.lower() != "bearer" or not self.known(key.strip()):
                self.refused("key")
                await refuse(send, 401, "invalid_api_key", NO_KEY, "authentication_error")
                return
        await self.app(scope, receive, send)


class HostGuard:
    """Answers only to the names by which it may be called, so that no web page can reach a server of this machine by a
    name of its own that leads here; and to no request that a browser sends for a page of another site."""

    def __init__(self, app: App, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        if scope["type"] == "http" and host_of(headers.get(b"host", b"")) not in self.hosts:
            names = ", ".join(sorted(self.hosts))
            await refuse(send, 421, "wrong_host", f"called by a name that is not one of {names}; see far serve --host")
            return
        origin = headers.get(b"origin")
        elsewhere = origin is not None and host_of(origin.partition(b"://")[2]) not in self.hosts
        if elsewhere or headers.get(b"sec-fetch-site") == b"cross-site":
            await refuse(send, 403, "wrong_origin", "asked by a page of another site; this server answers none")
            return
        await self.app(scope, receive, send)


def host_of(header: bytes) -> str:
    """The name or address of a Host header, without the port."""
    text = header.decode("latin-1").strip().lower()
    return text[1 : text.find("]")] if text.startswith("[") else text.partition(":")[0]


async def refuse(send: Send, status: int, code: str, message: str, kind: str = "invalid_request_error") -> None:
    """Answer with an error and hang up."""
    detail = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": detail}).encode()
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", b"application/json"), length, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
