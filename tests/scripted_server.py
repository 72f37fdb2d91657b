"""A scripted OpenAI-compatible server, in a process of its own: it streams what each request's script says,
and logs when it wrote every chunk.

The bytes are those of vLLM's `/v1/completions` (`entrypoints/openai/completion/serving.py`): an event per
chunk, the prompt's ids in the first, a usage event without choices, `[DONE]`. A request carries its script in
the field `script` of its body; what it leaves out is the server's own default (`--default`), which may be a list of
scripts: a prompt of token ids then has the one at the place of its first id. Times are
`time.monotonic`, which all processes of a machine share, taken just before the bytes are handed to the
kernel (asyncio's own loop sends at once; uvloop would put it off to the end of its round).

    python tests/scripted_server.py [--port 0] [--default '{"gap": 0.01}'] [--api-key KEY] [--no-log]
"""
import argparse
import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import httptools
import msgspec

FAULTS = ("close", "status", "unauthorized", "no_stream", "stall", "truncate", "end", "no_done", "error", "few", "empty", "blank", "no_usage", "no_finish")
WORDS = [" the", " caf\u00e9", "\n", " \"quoted\"", " \U0001f600", " back\\slash", " 42", "", " data: {}", "\t\u65e5\u672c"]


class Script(msgspec.Struct, forbid_unknown_fields=True):
    """What to do with one request.

    Attributes:
        id: name of the request in the log.
        ttft: seconds from the whole request read to the first chunk.
        gap: seconds between chunks, or several that are taken in turn. A late server catches up.
        chunks: how many; None for as many as `max_tokens` asks.
        tokens: in each chunk.
        fault: one of FAULTS, `at` so many chunks.
        status, message: of the fault "status" and of an error event.
        token_ids: False leaves them out even if asked for.
        newline: what ends a line of the stream.
        comments: a keep-alive comment before every chunk, as vLLM's `--sse-keep-alive-interval`.
        pieces: in how many writes a chunk goes out.
        refuses: fields of a request that are answered with 400, as a strict server does.
    """
    id: str = ""
    ttft: float = 0.0
    gap: float | list[float] = 0.0
    chunks: int | None = None
    tokens: int = 1
    fault: str | None = None
    at: int = 2
    status: int = 500
    message: str = "the engine is on fire"
    token_ids: bool = True
    newline: str = "\n"
    comments: bool = False
    pieces: int = 1
    refuses: list[str] = []


class Body(msgspec.Struct):
    """The fields of a request that matter here."""
    prompt: str | list[int] = ""
    messages: list | None = None
    model: str = "scripted"
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    return_token_ids: bool = False
    script: dict | None = None


BODY = msgspec.json.Decoder(Body)


def word(index: int) -> str:
    """Text of the chunk at this place."""
    return WORDS[index % len(WORDS)]


def token(index: int) -> int:
    """Id of the token at this place."""
    return 100 + index % 49000


@functools.lru_cache(maxsize=100_000)
def choices(index: int, tokens: int, ids: bool, last: bool, chat: bool, prompt: str = "null") -> str:
    """The part of an event that does not depend on the request."""
    found = json.dumps([token(index * tokens + i) for i in range(tokens)], separators=(",", ":")) if ids else "null"
    reason, text = '"length"' if last else "null", json.dumps(word(index), ensure_ascii=False)
    if chat:
        return f'"choices":[{{"index":0,"delta":{{"content":{text}}},"logprobs":null,"finish_reason":{reason},"token_ids":{found}}}]}}'
    return (f'"choices":[{{"index":0,"text":{text},"logprobs":null,"finish_reason":{reason},"stop_reason":null,'
            f'"prompt_token_ids":{prompt},"token_ids":{found}}}]}}')


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, server: "Server"):
        self.server = server

    def connection_made(self, transport):
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.parser, self.timer = httptools.HttpRequestParser(self), None

    def connection_lost(self, error):
        if self.timer:
            self.timer.cancel()

    def data_received(self, data):
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self):
        self.body, self.headers = [], {}

    def on_url(self, url):
        self.url = url.decode().partition("?")[0]

    def on_header(self, name, value):
        self.headers[name.lower()] = value

    def on_body(self, body):
        self.body.append(body)

    def on_message_complete(self):
        received = time.monotonic()
        if self.url == "/log":
            lines, self.server.log = self.server.log, []
            return self.answer(200, b"\n".join(map(msgspec.json.encode, lines)))
        if self.url == "/count":
            return self.answer(200, b"%d" % self.server.count)
        if self.url.startswith("/v1") and self.server.api_key and self.headers.get(b"authorization") != f"Bearer {self.server.api_key}".encode():
            return self.answer(401, b'{"error":"Unauthorized"}')  # vLLM's middleware says just this
        if self.url == "/v1/models":
            return self.answer(200, b'{"object":"list","data":[{"id":"scripted","object":"model","root":"scripted","created":1,"owned_by":"test"}]}')
        if not self.url.endswith("/completions"):
            return self.answer(200 if self.url in ("/health", "/ping", "/") else 404, b"{}")
        try:
            body = BODY.decode(b"".join(self.body))
            script = msgspec.convert(self.server.default_of(body) | (body.script or {}), Script)
        except msgspec.ValidationError as error:
            return self.fail(400, str(error))
        if refused := [name for name in script.refuses if name in msgspec.json.decode(b"".join(self.body))]:
            return self.fail(400, f"Unrecognized request argument supplied: {refused[0]}")
        self.start(body, script, received)

    def start(self, body: Body, script: Script, received: float):
        if script.fault == "close":
            return self.transport.abort()
        if script.fault == "status":
            return self.fail(script.status, script.message)
        if script.fault == "unauthorized":
            return self.answer(401, b'{"error":"Unauthorized"}')
        if script.fault == "no_stream":
            return self.answer(200, b'{"choices":[{"index":0,"text":"all at once"}]}')
        self.script, self.sent, self.chat = script, 0, "chat" in self.url
        self.total = 1 if script.fault == "blank" else script.chunks or -(-(body.max_tokens or body.max_completion_tokens or 16) // script.tokens)
        self.gaps = script.gap if isinstance(script.gap, list) else [script.gap]
        self.ids = body.return_token_ids and script.token_ids
        self.prompt = json.dumps(body.prompt) if self.ids and isinstance(body.prompt, list) else "null"
        self.prompt_tokens = len(body.prompt) if isinstance(body.prompt, list) else max(1, len(body.prompt.split()))
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        self.head = f'{{"id":"cmpl-{self.server.count:032x}","object":"{kind}","created":1700000000,"model":{json.dumps(body.model)},'
        self.server.count += 1
        self.record = {"id": script.id, "received": received, "writes": [], "tokens": []}
        if self.server.logging:
            self.server.log.append(self.record)
        self.transport.write(b"HTTP/1.1 200 OK\r\nserver: scripted\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
        self.due = received + script.ttft
        self.timer = asyncio.get_running_loop().call_at(self.due, self.step)

    def step(self):
        """Write all the chunks that are due, in one go, and wait for the next."""
        script, pieces, now = self.script, [], time.monotonic()
        while self.due <= now:
            if script.fault in ("stall", "truncate", "end", "error") and self.sent == script.at:
                self.transport.write(b"".join(pieces))
                return self.break_off()
            pieces.append(self.chunk())
            self.record["writes"].append(now)
            self.record["tokens"].append(script.tokens)
            self.due += self.gaps[self.sent % len(self.gaps)]
            self.sent += 1
            if self.sent == self.total:
                return self.transport.write(b"".join((*pieces, *self.tail())))
        if script.pieces > 1 and pieces:
            data, size = b"".join(pieces), -(-len(pieces[0]) // script.pieces)
            for start in range(0, len(data), size):
                self.transport.write(data[start:start + size])
        elif pieces:
            self.transport.write(b"".join(pieces))
        self.timer = asyncio.get_running_loop().call_at(self.due, self.step)

    def chunk(self) -> bytes:
        last = self.sent == self.total - 1 and self.script.fault != "no_finish"
        prompt = self.prompt if self.sent == 0 else "null"
        if self.script.fault == "empty":
            return self.event(self.head + '"choices":[]}')
        if self.script.fault == "blank":  # the model ended at once, and the server does not count how
            return self.event(self.head + '"choices":[{"index":0,"text":"","finish_reason":"stop"}]}')
        make = choices if prompt == "null" else choices.__wrapped__
        return self.event(self.head + make(self.sent, self.script.tokens, self.ids, last, self.chat, prompt))

    def tail(self) -> Iterator[bytes]:
        output = 0 if self.script.fault == "blank" else self.sent * self.script.tokens + (3 if self.script.fault == "few" else 0)
        if self.script.fault != "no_usage":
            yield self.event(f'{self.head}"choices":[],"usage":{{"prompt_tokens":{self.prompt_tokens},'
                             f'"total_tokens":{self.prompt_tokens + output},"completion_tokens":{output}}}}}')
        if self.script.fault != "no_done":
            yield self.event("[DONE]")
        yield b"0\r\n\r\n"

    def break_off(self):
        if self.script.fault == "truncate":
            self.transport.close()
        elif self.script.fault == "end":
            self.transport.write(b"0\r\n\r\n")
        elif self.script.fault == "error":
            error = json.dumps({"error": {"message": self.script.message, "type": "InternalServerError", "param": None, "code": 500}})
            self.transport.write(self.event(error) + self.event("[DONE]") + b"0\r\n\r\n")

    def event(self, data: str) -> bytes:
        newline = self.script.newline
        body = f"{': keep-alive' + 2 * newline if self.script.comments else ''}data: {data}{2 * newline}".encode()
        return b"%x\r\n%b\r\n" % (len(body), body)

    def fail(self, status: int, message: str):
        error = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
        self.answer(status, json.dumps(error).encode())

    def answer(self, status: int, body: bytes):
        self.transport.write(b"HTTP/1.1 %d Scripted\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))


class Server:
    """What the connections share."""

    def __init__(self, default: dict | list[dict], api_key: str, logging: bool):
        self.default, self.api_key, self.logging = default, api_key, logging
        self.log, self.count = [], 0

    def default_of(self, body: Body) -> dict:
        """What the request's own script leaves out."""
        return self.default[body.prompt[0]] if isinstance(self.default, list) else self.default


async def serve(args: argparse.Namespace) -> None:
    server = Server(json.loads(args.default), os.environ.get("SCRIPTED_API_KEY", ""), not args.no_log)
    msgspec.convert(server.default if isinstance(server.default, list) else [server.default], list[Script])
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", args.port, backlog=4096)
    stop = loop.create_future()
    loop.add_signal_handler(signal.SIGTERM, stop.set_result, None)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await stop


class Running:
    """A server that runs, as a test sees it."""

    def __init__(self, port: int, process: subprocess.Popen):
        self.url, self.process = f"http://127.0.0.1:{port}", process

    def log(self) -> dict[str, dict]:
        """What was written since the last call, by the request's id; forgotten by the server."""
        with urllib.request.urlopen(self.url + "/log") as reply:
            return {record["id"]: record for record in map(json.loads, reply.read().splitlines())}

    def count(self) -> int:
        """How many streams it has begun."""
        with urllib.request.urlopen(self.url + "/count") as reply:
            return int(reply.read())

    @contextlib.contextmanager
    def first_in_line(self) -> Iterator[None]:
        """This thread and the server go before all other processes, where that is allowed: for times that are to be
        theirs and not the scheduler's."""
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        with contextlib.suppress(PermissionError):
            for pid in (0, self.process.pid):
                os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))
        try:
            yield
        finally:
            os.sched_setscheduler(0, *before)


@contextlib.contextmanager
def running(default: dict | list[dict] | None = None, api_key: str = "", log: bool = True) -> Iterator[Running]:
    """A server in a process of its own, stopped on leaving."""
    words = [sys.executable, __file__, "--default", json.dumps(default or {}), *([] if log else ["--no-log"])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"SCRIPTED_API_KEY": api_key}) as process:
        try:
            yield Running(int(process.stdout.readline()), process)
        finally:
            process.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--default", default="{}", help="a script as JSON, or a list of them, for requests without one")
    parser.add_argument("--no-log", action="store_true", help="keep no log (for very long runs)")
    asyncio.run(serve(parser.parse_args()))
