"""The layer between the sockets and the application: limits in bytes and seconds, headers, streams, shutdown."""

import asyncio
import errno
import hmac
import json
import logging
import re
import socket
import time

import uvicorn
from starlette.responses import StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.common import UserError

logger = logging.getLogger(__name__)
PING = b": ping\n\n"  # a comment: clients skip it, proxies see that the line is alive


def open_socket(host, port) -> socket.socket:
    """A listening socket. Raises UserError if the address is not available."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"cannot listen on {host} port {port} ({reason}): choose another --port or --host") from error


class PatientProtocol(H11Protocol):
    """
    HTTP/1.1 with timeouts: closes connections whose clients do not finish the head of a request in `head_seconds`, or
    accept no data of a response for `send_seconds`.
    """

    head_seconds = 30.0
    send_seconds = 30.0

    def connection_made(self, transport):
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing is paused whenever the client is behind
        self._timers = {}
        self._arm("head", self.head_seconds)

    def _arm(self, name, seconds):
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _disarm(self, name):
        if name in self._timers:
            self._timers.pop(name).cancel()

    def data_received(self, data):
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:  # still a part of the head
            self._arm("head", self.head_seconds)
        else:
            self._disarm("head")

    def pause_writing(self):
        super().pause_writing()
        self._arm("send", self.send_seconds)

    def resume_writing(self):
        super().resume_writing()
        self._disarm("send")

    def connection_lost(self, exc):
        for name in list(self._timers):
            self._disarm(name)
        super().connection_lost(exc)


class Gate:
    """
    ASGI middleware. Checks the API key; reads the whole body, bounded in bytes and seconds, before it is parsed; adds
    security headers; logs a line per request, without its text. Answers HEAD like GET, and tolerates superfluous
    slashes in paths.
    """

    body_seconds = 30.0

    def __init__(self, app, max_body_bytes, complain, api_key, public):
        """complain(status, message, code, param, headers): makes an error response. public: paths that need no key."""
        self.app, self.max_body_bytes, self.complain = app, max_body_bytes, complain
        self.api_key, self.public = api_key.encode(), public

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), None
        method, headers = scope["method"], dict(scope["headers"])
        path = re.sub("/+", "/", scope["path"]).removesuffix("/") or "/"
        # uvicorn sends no body, since its own scope says HEAD
        scope = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}

        async def send_with_headers(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                have = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((k, v) for k, v in SECURITY_HEADERS if k not in have)]
            await send(message)

        try:
            body, refusal = b"", self._check_key(path, headers)
            if method == "POST":
                body, refusal = await self._read(headers, receive, refusal or self._check_head(headers))
            if refusal:
                response = self.complain(*refusal)
                response.headers["Connection"] = "close"  # there may be more of the body
                await response(scope, receive, send_with_headers)
            elif body is not None:
                await self.app(scope, _replay(body, receive), send_with_headers)
        finally:
            if path != "/health":
                shown = scope["raw_path"].decode("ascii", "replace")[:80]
                seconds = time.monotonic() - start
                logger.info("%s %s %s %.2fs", method, shown, status or "client left", seconds)

    def _check_key(self, path, headers):
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if not self.api_key or path in self.public:
            return None
        if kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key):
            return None
        message = "this server requires its API key: send the header Authorization: Bearer KEY"
        return 401, message, "invalid_api_key", None, {"WWW-Authenticate": "Bearer"}

    async def _read(self, headers, receive, refusal):
        """(body, None), or (None, (status, message)) to refuse, or (None, None) if the client left."""
        if refusal and b"expect" in headers:  # the client waits for permission to send the body
            return None, refusal
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None, None
                    size += len(message["body"])
                    if size > self.max_body_bytes:
                        refusal = refusal or self._too_large()
                    if refusal:
                        body.clear()  # read on all the same: many clients hear nothing before they have sent all
                    else:
                        body += message["body"]
                    if not message["more_body"] or size > DISCARDED_BYTES:
                        return (None, refusal) if refusal else (bytes(body), None)
        except TimeoutError:
            return None, (408, f"the body did not arrive within {self.body_seconds:g} seconds")

    def _check_head(self, headers):
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # also keeps other sites' forms out, which cannot send this type
            return 415, f"expected Content-Type: application/json, got {kind.decode('ascii', 'replace')[:60]!r}"
        return self._too_large() if int(headers.get(b"content-length", 0)) > self.max_body_bytes else None

    def _too_large(self):
        return 413, f"the body is too large: at most {self.max_body_bytes} bytes are taken"


DISCARDED_BYTES = 64_000_000  # of a body that is refused, before the connection is cut
SECURITY_HEADERS = [
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),  # the page has its own
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


def _replay(body, receive):
    """A `receive` that gives the body already read, and then what comes after it: the disconnect."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay():
        return messages.pop() if messages else await receive()

    return replay


def sse(data, event=None) -> bytes:
    """A server-sent event with a JSON value, in ASCII: no client splits it at a Unicode line separator."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


class EventStream(StreamingResponse):
    """Server-sent events; `on_end` is called when the stream is over, whether it was finished or the client left."""

    media_type = "text/event-stream"

    def __init__(self, content, on_end):
        super().__init__(content, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.on_end = on_end

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:  # a generator that is merely dropped would be closed when it is collected, some time
            self.on_end()
            await self.body_iterator.aclose()


async def unless_gone(receive, work):
    """The result of a coroutine, or None if the client leaves before it has one."""
    work = asyncio.ensure_future(work)

    async def until_gone():
        while (await receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        gone.cancel()


class Server(uvicorn.Server):
    """
    Ends politely. At SIGTERM or SIGINT no new chat is taken (503, and /health says so), answers that are being
    made are finished for `drain_seconds` at most, and the process ends with 0. A second signal ends it at once.
    """

    FLUSH_SECONDS = 5  # for clients to take what has been made

    def __init__(self, app, pool, drain_seconds=30.0):
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=self.FLUSH_SECONDS,
            )
        )
        self.pool, self.drain_seconds = pool, drain_seconds
        self.signals = 0
        self.deadline = None

    def handle_exit(self, sig, frame):
        self.signals += 1  # no more than that: the signal may have come while the pool's lock was held

    async def on_tick(self, counter):
        if self.signals and self.deadline is None:
            self.deadline = time.monotonic() + self.drain_seconds
            self.pool.drain()
            if not self.pool.is_idle():
                logger.info("finishing the running answers, %g s at most; again to end at once", self.drain_seconds)
        if self.deadline is not None:
            done = self.pool.is_idle() or self.signals > 1 or time.monotonic() > self.deadline
            self.should_exit = self.should_exit or done
        return await super().on_tick(counter)

    async def shutdown(self, sockets=None):
        self.pool.drain()
        self.pool.abort("the server is shutting down")
        await super().shutdown(sockets)
        await asyncio.to_thread(self.pool.close)
