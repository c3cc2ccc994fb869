"""Middlewares that reject a request before the application sees it: its body, its API key, its origin."""

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
OnReject = Callable[[str], None]
"""Called with the reason for which a request is rejected."""

INVALID_KEY = "the API key is missing or unknown; send Authorization: Bearer KEY"


class BodyLimitMiddleware:
    """Reads the whole body of a request first, so that neither a large body nor a slow one holds a place in the queue.

    app: what comes next.
    max_bytes: size of the largest body; a larger one is answered with 413.
    max_bytes_by_path: the same for single paths.
    timeout: seconds within which the body has to arrive; a slower one is answered with 408.
    """

    def __init__(
        self, app: App, max_bytes: int, max_bytes_by_path: Mapping[str, int], timeout: float, on_reject: OnReject
    ) -> None:
        self.app, self.max_bytes, self.max_bytes_by_path = app, max_bytes, max_bytes_by_path
        self.timeout, self.on_reject = timeout, on_reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        max_bytes = self.max_bytes_by_path.get(scope["path"], self.max_bytes)
        try:
            body = await asyncio.wait_for(_read_body(scope, receive, max_bytes), self.timeout)
        except asyncio.TimeoutError:
            self.on_reject("slow_body")
            await reject(send, 408, "slow_body", f"the body did not arrive within {self.timeout:g} s; send it faster")
            return
        if body is None:
            self.on_reject("large_body")
            await reject(send, 413, "large_body", f"the body has more than {max_bytes} bytes; send less")
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()  # returns when the client disconnects
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


async def _read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes | None:
    """The body, or what had arrived when the client disconnected; None if it is too large."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit() or int(length) > max_bytes:
        return None
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > max_bytes:
            return None
    return b"".join(parts)


class ApiKeyMiddleware:
    """Answers a request under /v1 without a valid key with 401, before its body is read."""

    def __init__(self, app: App, is_valid: Callable[[str], bool], on_reject: OnReject) -> None:
        self.app, self.is_valid, self.on_reject = app, is_valid, on_reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and scope["method"] not in ("GET", "HEAD"):
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
            if scheme.lower() != "bearer" or not self.is_valid(key.strip()):
                self.on_reject("key")
                await reject(send, 401, "invalid_api_key", INVALID_KEY, "authentication_error")
                return
        await self.app(scope, receive, send)


class HostMiddleware:
    """Answers only requests to the server's own host names (else 421) and from its own pages (else 403).

    Without it, any web page could reach a server on the user's machine through a DNS name that resolves to 127.0.0.1.
    """

    def __init__(self, app: App, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        if scope["type"] == "http" and host_name(headers.get(b"host", b"")) not in self.hosts:
            names = ", ".join(sorted(self.hosts))
            message = f"the Host header is none of {names}; see far serve --host"
            await reject(send, 421, "wrong_host", message)
            return
        origin = headers.get(b"origin")
        is_foreign = origin is not None and host_name(origin.partition(b"://")[2]) not in self.hosts
        if is_foreign or headers.get(b"sec-fetch-site") == b"cross-site":
            message = "the request comes from a page of another site, which this server does not answer"
            await reject(send, 403, "wrong_origin", message)
            return
        await self.app(scope, receive, send)


def host_name(header: bytes) -> str:
    """The name or address in a Host header, without the port."""
    text = header.decode("latin-1").strip().lower()
    return text[1 : text.find("]")] if text.startswith("[") else text.partition(":")[0]


async def reject(send: Send, status: int, code: str, message: str, error_type: str = "invalid_request_error") -> None:
    """Answer with an error in OpenAI's form and close the connection."""
    detail = {"message": message, "type": error_type, "param": None, "code": code}
    body = json.dumps({"error": detail}).encode()
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", b"application/json"), length, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
