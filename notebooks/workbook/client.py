"""A streaming client for OpenAI-compatible completions that takes little CPU and tells the time right.

What is measured shares its machine with the client, so while a chunk arrives the client does only one thing:
it notes the time, in the very callback that hands the bytes over, before any coroutine wakes up. The rest is
done when the answer is whole, in one go. uvloop (where there is one), httptools and msgspec do the work that
is theirs; by hand are the connection, since an HTTP client library would wake a coroutine for every chunk,
and the splitting of events, since each needs its time.

Nothing is retried: a request that fails is a `Reply` with a sentence in `error`.
"""
import asyncio
import contextlib
import math
import os
import re
import resource
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from workbook.errors import BadInput
from workbook.streams import Reply, Stream, message

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that holds the API key: the one place it is taken from. It is never logged."""

STALL_S = 60.0
"""Seconds without a byte after which an answer that has begun has failed."""

IDLE_S = 1.0
"""Seconds after which an idle connection is not used again: servers close theirs after some (gunicorn after 2, vLLM after 5)."""
NEW_S = 20.0
"""The same of one that was never used, which servers give longer for its first request (some 30 s, vLLM any time)."""

AT_ONCE = 500
"""Connections that are opened before the server is known to have taken them: its kernel holds a number that its process has not
taken yet (2,048 for vLLM, 511 for nginx), drops what comes on top, to be sent again a second later, and resets some of it."""
OPEN_S = 15.0
"""Seconds for opening them: less than `NEW_S`, and than what `limits` leaves a pass that is over its time."""

PARSE_AT = 64
"""Reads after which an answer that is still coming is parsed so far: what is left at the end holds up the next request
of a closed loop."""

_encode = msgspec.json.Encoder().encode
_monotonic = time.monotonic


@dataclass(slots=True)
class Request:
    """One sample to be generated.

    Attributes:
        prompt: token ids, or text.
        sampling: more fields of the request's body (temperature, top_p, ignore_eos, ...).
        arrival: when it is due by its schedule, `time.monotonic`; a load driver sets it.
    """
    prompt: list[int] | str
    max_tokens: int
    model: str
    seed: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    arrival: float | None = None


def api_key() -> str:
    """The API key of the environment; empty if there is none.

    Raises:
        BadInput: it holds a character that no key has.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise BadInput(f"the environment variable {KEY_VARIABLE} holds a character that no key has; expected printable ASCII")
    return key


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time."""

    def __init__(self, client: "Client"):
        self.client, self.loop, self.waiter, self.open = client, asyncio.get_running_loop(), None, True

    def connection_made(self, transport) -> None:
        self.transport, self.good_until = transport, _monotonic() + NEW_S

    def ask(self, head: bytes, body: bytes, reply: Reply) -> asyncio.Future:
        """Send a request; the future is done when its reply is."""
        self.waiter, self.stream = self.loop.create_future(), Stream(reply)
        self.reads, self.read_times, self.body, self.body_times = [], [], [], []
        self.on_body = self.body.append  # the parser calls the list itself
        self.parser = httptools.HttpResponseParser(self)
        self.status, self.is_stream, self.whole, self.put_off = 0, False, False, False
        reply.sent = self.last = _monotonic()
        self.timer = self.loop.call_later(min(self.client.stall_s, self.client.timeout_s), self.watch)
        self.transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), body))
        return self.waiter

    def data_received(self, data: bytes) -> None:
        """Note the time. Parsing waits for the end, which in a chunked answer is an empty line: done at every
        chunk it would find the processor's caches cold, and cost several times as much."""
        self.last = now = _monotonic()
        if self.waiter is None:  # nobody asked: no connection to use again
            return self.transport.abort()
        self.reads.append(data)
        self.read_times.append(now)
        if not self.put_off or data.endswith(b"\r\n\r\n") or len(data) < 4 or len(self.reads) >= PARSE_AT:
            self.parse()
            if self.whole:
                self.end()

    def parse(self) -> None:
        """Take in what was read so far: HTTP, then the events in it."""
        body, body_times, feed, broken = self.body, self.body_times, self.parser.feed_data, None
        try:
            for data, at in zip(self.reads, self.read_times, strict=True):
                feed(data)
                while len(body_times) < len(body):
                    body_times.append(at)
        except httptools.HttpParserError as error:
            broken = error
        self.reads, self.read_times = [], []
        if self.is_stream and self.status == 200:
            self.stream.take(body[:len(body_times)], body_times)
            body.clear()
            body_times.clear()
        if broken:
            self.end("malformed", f"the answer is not HTTP/1.1 ({broken})")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.is_stream = value.startswith(b"text/event-stream")
        elif name == b"transfer-encoding":
            self.put_off = value.lower() == b"chunked"

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_message_complete(self) -> None:
        self.whole, self.keep = True, self.parser.should_keep_alive()  # the parser forgets it after this

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self.waiter is None:
            return
        self.parse()
        if self.status:
            self.end("truncated", f"the connection closed after {self.stream.tokens} tokens, before the end of the stream")
        else:
            self.end("closed", "the server closed the connection without an answer")

    def watch(self) -> None:
        """Give up if no byte came for too long; else look again when that could next be so. One timer for the
        whole request: to move it at every chunk would cost more than all else. Before its first token a request
        may be waiting for its turn, and only the whole time counts."""
        self.parse()
        if self.whole:
            self.end()
        if self.waiter is None:
            return
        over = self.stream.reply.sent + self.client.timeout_s
        stalled = self.last + self.client.stall_s if self.stream.tokens else math.inf
        wait = min(stalled, over) - _monotonic()
        if wait > 1e-3:
            self.timer = self.loop.call_later(min(wait, self.client.stall_s), self.watch)
            return
        when = f"after {self.stream.tokens} tokens" if self.stream.tokens else "before the first token"
        if stalled <= over:
            self.end("stalled", f"no byte came for {self.client.stall_s:g} s {when}")
        else:
            self.end("timeout", f"the answer was not whole within {self.client.timeout_s:g} s; given up {when}")

    def end(self, fault: str = "", sentence: str = "") -> None:
        """The request is over; the connection is kept if it can be used again."""
        if self.waiter is None:
            return
        self.timer.cancel()
        waiter, self.waiter = self.waiter, None
        if self.status not in (0, 200):
            fault, sentence = self.client.refusal(self.status, b"".join(self.body))
        elif self.whole and not self.is_stream:
            fault, sentence = "not_a_stream", "the answer is no event stream: expected a server that honours 'stream'"
        keep = self.whole and self.keep and self.open
        self.parser = self.on_body = None  # it and this connection hold on to each other
        self.good_until = self.last + IDLE_S
        if keep:
            self.client.idle.append(self)
        else:
            self.transport.abort()
        reply = self.stream.finish(fault, sentence)
        if not waiter.done():
            waiter.set_result(reply)

    def give_up(self) -> None:
        """Nobody waits for the reply any more."""
        self.timer.cancel()
        self.waiter = None
        self.transport.abort()


class Client:
    """Requests to one server, over as many connections as there are requests at a time.

    Args:
        url: of the server, with or without `/v1`.
        stall_s: seconds without a byte after which an answer that has begun has failed.
        timeout_s: seconds after which a request that still runs has failed.
        token_ids: ask for the ids (vLLM's `return_token_ids`), which also tell how many tokens a chunk has.

    Raises:
        BadInput: the URL or the key cannot be used.
    """

    def __init__(self, url: str, *, stall_s: float = STALL_S, timeout_s: float = 600.0, token_ids: bool = True):
        self.url, self.stall_s, self.timeout_s = url.rstrip("/").removesuffix("/v1"), stall_s, timeout_s
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"the endpoint is {url!r}; expected a URL such as http://127.0.0.1:8000")
        self.key = api_key()
        self.address = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        authorization = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        rest = f"Host: {parts.netloc.rpartition('@')[2]}\r\n{authorization}Content-Length: "  # the number follows, then the body
        self.head = f"POST {parts.path}/v1/completions HTTP/1.1\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\n{rest}".encode()
        self.knock = f"GET {parts.path}/v1/models HTTP/1.1\r\n{rest}".encode()
        self.fixed = {"stream": True, "stream_options": {"include_usage": True}} | ({"return_token_ids": True} if token_ids else {})
        self.idle: list[_Connection] = []
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit < most:  # a connection is an open file, and the usual limit is 1,024
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def open(self, count: int) -> None:
        """Open connections for so many requests that are due at once, before they are, at a pace that the server keeps up with. What
        is not open after `OPEN_S` is left to the requests, which say why."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OPEN_S):
                while count > 0:
                    wave = min(AT_ONCE, count)
                    failed = await asyncio.gather(*(self._open() for _ in range(wave)), return_exceptions=True)
                    count -= wave
                    if any(failed) or not count or not (last := self._reusable()):
                        return
                    # A server takes connections in turn: its answer on the last says that it has taken them all. That one has been used
                    # then, so that the server soon closes it: another takes its place.
                    await self._ask(last, self.knock, b"", Reply())
                    self._drop(last)
                    count += 1

    async def _open(self) -> None:
        self.idle.append(await self._connect())

    def _drop(self, connection: _Connection) -> None:
        connection.transport.abort()
        self.idle = [kept for kept in self.idle if kept is not connection]

    async def complete(self, request: Request) -> Reply:
        """Send one request and wait for its reply, good or not."""
        reply, seed = Reply(arrival=request.arrival), {} if request.seed is None else {"seed": request.seed}
        body = _encode({"model": request.model, "prompt": request.prompt, "max_tokens": request.max_tokens} | seed | request.sampling | self.fixed)
        connection = self._reusable()
        if connection is None:
            try:
                async with asyncio.timeout(min(self.stall_s, self.timeout_s)):
                    connection = await self._connect()
            except OSError as error:  # TimeoutError is one
                reply.fault, reply.error = self._unreachable(error)
                return reply
        return await self._ask(connection, self.head, body, reply)

    async def close(self) -> None:
        """Close the idle connections."""
        while self.idle:
            self.idle.pop().transport.abort()
        await asyncio.sleep(0)

    def refusal(self, status: int, body: bytes) -> tuple[str, str]:
        """Fault and sentence of an answer other than 200."""
        try:
            said = message(msgspec.json.decode(body))
        except (msgspec.DecodeError, UnicodeDecodeError):
            said = body.decode(errors="replace")
        if self.key:  # some servers repeat it
            said = said.replace(self.key, "[key]")
        said = " ".join(said.split())[:500]
        said = f"HTTP {status}{': ' if said else ''}{said}"
        if status in (401, 403):
            state = "holds a wrong one" if self.key else "is not set"
            return "unauthorized", f"the server refused the API key ({said}); expected it in the environment variable {KEY_VARIABLE}, which {state}"
        return "http", f"the server answered {said}"

    async def _ask(self, connection: _Connection, head: bytes, body: bytes, reply: Reply) -> Reply:
        try:
            return await connection.ask(head, body, reply)
        except asyncio.CancelledError:
            connection.give_up()
            raise

    def _reusable(self) -> _Connection | None:
        while self.idle:
            connection = self.idle.pop()
            if connection.open and not connection.transport.is_closing() and _monotonic() < connection.good_until:
                return connection
            connection.transport.abort()
        return None

    async def _connect(self) -> _Connection:
        host, port = self.address
        return (await asyncio.get_running_loop().create_connection(lambda: _Connection(self), host, port, ssl=self.tls))[1]

    def _unreachable(self, error: OSError) -> tuple[str, str]:
        if isinstance(error, ConnectionRefusedError):
            return "refused", f"nothing listens at {self.url} (connection refused)"
        if isinstance(error, TimeoutError):
            return "unreachable", f"no connection to {self.url} within {min(self.stall_s, self.timeout_s):g} s"
        return "unreachable", f"no connection to {self.url}: {error.strerror or error}"
