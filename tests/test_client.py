"""The client's times are the server's; what goes wrong is said in a sentence; events may be cut anywhere."""
import asyncio
import contextlib
import json
import random
import socket
import threading
import time

import numpy as np
import pytest
import scripted_server
from hypothesis import given, settings
from hypothesis import strategies as st

from workbook import arrivals, client, streams
from workbook.client import Client, Request
from workbook.errors import BadInput


@pytest.fixture(scope="module")
def server():
    with scripted_server.running() as running:
        yield running


def request(max_tokens=4, prompt=(1, 2, 3), **script):
    return Request(list(prompt), max_tokens, "scripted", seed=1, sampling={"temperature": 0.0, "script": script})


def ask(url, asked, **options):
    async def main():
        one = Client(url, **options)
        try:
            return await one.complete(asked)
        finally:
            await one.close()
    return arrivals.run(main())


def metrics(rows):
    """Every metric as design.md defines it, of one repetition: (arrival, time of each chunk, tokens in each) a request."""
    arrival = np.array([row[0] for row in rows])
    first, last = (np.array([row[1][i] for row in rows]) for i in (0, -1))
    tokens = np.array([sum(row[2]) for row in rows])
    gaps = np.concatenate([np.diff(row[1]) for row in rows])
    found = {"output_tok_s": tokens.sum() / (last.max() - arrival.min())}
    for name, values in (("ttft_ms", (first - arrival) * 1e3), ("tpot_ms", (last - first) / (tokens - 1) * 1e3), ("itl_ms", gaps * 1e3),
                         ("e2e_ms", (last - arrival) * 1e3), ("request_tok_s", tokens / (last - arrival))):
        found |= {f"{name}_p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return found


@pytest.mark.parametrize("concurrency, chunks, tokens, rounds", [(1, 600, 1, 2), (32, 60, 1, 2), (32, 60, 3, 1), (256, 10, 1, 2)])
def test_every_metric_is_that_of_the_servers_log(server, concurrency, chunks, tokens, rounds):
    """2,000 chunks a second in all, uneven: within 2 % or 2 ms, in the median of three repetitions.

    A chunk that waits for a client without a processor is late, and not by the client's fault. How long it and
    the server waited is known whatever the times say: of up to seven repetitions those that waited least count. Nobody
    tells when a virtual machine's host took the processor away (seen: 2 to 20 ms, every three to ten seconds), and
    of two requests each percentile is a single chunk's time: hence the median. What is the client's is in all three.
    """
    draw, mean = random.Random(concurrency), concurrency / 2000
    batch = [request(chunks * tokens, tokens=tokens, id=str(number), ttft=draw.uniform(0.02, 0.02 + mean * 3),
                     gap=[draw.uniform(0.2 * mean, 1.8 * mean) for _ in range(7)]) for number in range(concurrency * rounds)]
    found = []
    for _ in range(7):
        began, waited = time.monotonic(), waiting(server)
        with server.first_in_line():
            ours, right = both(server, batch, concurrency)
        share = (waiting(server) - waited) / (time.monotonic() - began)
        found = sorted([*found, (share, ours, right)], key=lambda one: one[0])[:3]
        if len(found) == 3 and found[-1][0] < 0.15:
            break
    assert off(found) == {}, f"while the two waited for a processor up to {found[-1][0]:.0%} of the time"


def both(server, batch, concurrency):
    """One repetition: its metrics by the client's replies, and by the server's log."""
    server.log()

    async def main():
        one = Client(server.url)
        done = await arrivals.closed_loop(one.complete, batch, concurrency)
        await one.close()
        return done.replies
    replies = arrivals.run(main())
    log = server.log()
    assert [r.error for r in replies] == [""] * len(batch)
    assert all(list(r.chunk_tokens) == log[str(n)]["tokens"] for n, r in enumerate(replies))
    return (metrics([(r.arrival, r.chunk_times, r.chunk_tokens) for r in replies]),
            metrics([(r.arrival, log[str(n)]["writes"], log[str(n)]["tokens"]) for n, r in enumerate(replies)]))


def off(found):
    """The metrics whose median difference is more than 2 % and, of those that are times, more than 2 ms."""
    wrong = {}
    for name in found[0][2]:
        right = np.median([theirs[name] for _, _, theirs in found])
        difference = np.median([ours[name] - theirs[name] for _, ours, theirs in found])
        if abs(difference) > max(0.02 * right, 2.0 if "_ms_" in name else 0.0):
            wrong[name] = (difference, right)
    return wrong


def waiting(server):
    """Seconds that client and server have waited for a processor that another process had (Linux's schedstat)."""
    return sum(int(open(f"/proc/{pid}/schedstat").read().split()[1]) for pid in ("self", server.process.pid)) / 1e9


def test_no_chunk_arrives_before_it_was_written(server):
    server.log()
    reply = ask(server.url, request(200, id="one", gap=0.002))
    delays = np.array(reply.chunk_times) - np.array(server.log()["one"]["writes"])
    assert (delays >= 0).all() and np.median(delays) < 0.002
    assert reply.sent <= reply.first_token == reply.chunk_times[0] < reply.last_token == reply.chunk_times[-1]


def test_a_whole_reply(server):
    reply = ask(server.url, request(25, prompt=range(10, 17), tokens=3))
    assert reply.text == "".join(map(scripted_server.word, range(9)))
    assert list(reply.token_ids) == list(map(scripted_server.token, range(27))) and list(reply.chunk_tokens) == [3] * 9
    assert (reply.prompt_tokens, reply.output_tokens, reply.finish_reason, reply.fault, reply.error) == (7, 27, "length", "", "")


@pytest.mark.parametrize("script", [{"newline": "\r\n"}, {"newline": "\r"}, {"comments": True}, {"pieces": 7, "gap": 0.002},
                                    {"pieces": 3, "newline": "\r\n", "comments": True, "gap": 0.002}])
def test_other_ways_to_send_the_same(server, script):
    reply = ask(server.url, request(40, **script))
    assert (reply.text, reply.output_tokens, len(reply.chunk_times), reply.error) == ("".join(map(scripted_server.word, range(40))), 40, 40, "")


def test_without_token_ids(server):
    for reply in (ask(server.url, request(30, token_ids=False)), ask(server.url, request(30), token_ids=False)):
        assert (reply.token_ids, reply.output_tokens, list(reply.chunk_tokens), reply.error) == (None, 30, [1] * 30, "")


def test_a_long_answer_is_parsed_as_it_comes(server, monkeypatch):
    monkeypatch.setattr(client, "PARSE_AT", 5)
    reply = ask(server.url, request(60, gap=0.001))
    assert (reply.output_tokens, len(reply.chunk_times), len(reply.token_ids), reply.error) == (60, 60, 60, "")


def test_connections_are_used_again(server):
    async def main():
        one = Client(server.url)
        await arrivals.closed_loop(one.complete, [request() for _ in range(20)], 2)
        idle = len(one.idle)
        await one.close()
        return idle
    assert arrivals.run(main()) == 2


@contextlib.contextmanager
def slow_to_take(backlog, every_s):
    """The URL of a server that takes a few connections every so often, as one whose one thread is at work does."""
    loop, scripted = asyncio.new_event_loop(), scripted_server.Server({}, "", False)

    async def work():
        while True:
            await asyncio.sleep(0)
            time.sleep(every_s)
    listening = loop.run_until_complete(loop.create_server(lambda: scripted_server.Connection(scripted), "127.0.0.1", 0, backlog=backlog))
    busy = loop.create_task(work())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(busy.cancel)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()
        loop.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_connections_for_many_requests_at_once_are_opened_as_the_server_takes_them(ahead, monkeypatch):
    """What its kernel cannot hold is dropped, and sent again after a second: the control without opening them ahead."""
    monkeypatch.setattr(client, "AT_ONCE", 8)

    async def main():
        one = Client(url)
        if ahead:
            await one.open(100)
        began, idle = time.monotonic(), len(one.idle)
        replies = await asyncio.gather(*(one.complete(request()) for _ in range(100)))
        await one.close()
        return idle, [reply.error for reply in replies], max(reply.sent for reply in replies if reply.sent) - began
    with slow_to_take(backlog=12, every_s=0.1) as url:
        idle, errors, last_sent = arrivals.run(main())
    if ahead:
        assert idle == 100 and set(errors) == {""} and last_sent < 0.9
    else:
        assert idle == 0 and last_sent > 0.9


@pytest.mark.parametrize("many", [3, 20])
def test_connections_that_close_at_once_are_left_to_the_requests(many, monkeypatch):
    """As of a proxy whose own server is down."""
    monkeypatch.setattr(client, "AT_ONCE", 8)

    async def main():
        listening = await asyncio.get_running_loop().create_server(Closing, "127.0.0.1", 0)
        one = Client(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        await one.open(many)
        replies = await asyncio.gather(*(one.complete(request()) for _ in range(many)))
        await one.close()
        listening.close()
        return {reply.fault for reply in replies}
    assert arrivals.run(main()) == {"closed"}


class Closing(asyncio.Protocol):
    def connection_made(self, transport):
        transport.close()


def test_a_server_that_takes_no_more_connections_holds_up_nothing(monkeypatch):
    """Those that it took before are there to be used, and closed with the client."""
    monkeypatch.setattr(client, "OPEN_S", 0.3)
    monkeypatch.setattr(client, "AT_ONCE", 8)

    async def main():
        one, began = Client(f"http://127.0.0.1:{deaf.getsockname()[1]}"), time.monotonic()
        await one.open(20)
        took, sockets = time.monotonic() - began, [c.transport for c in one.idle]
        await one.close()
        return took, len(sockets), all(transport.is_closing() for transport in sockets)
    with socket.create_server(("127.0.0.1", 0), backlog=3) as deaf:
        took, opened, closed = arrivals.run(main())
    # The event loop counts its time in whole milliseconds: its timers end up to one early (by 0.2 ms in one of 15 here).
    assert 0.299 <= took < 1.5 and opened >= 3 and closed


def test_connections_that_cannot_be_opened_are_left_to_the_requests():
    async def main():
        one = Client(url)
        await one.open(3)
        return len(one.idle)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert arrivals.run(main()) == 0


FAULTS = [
    ({"fault": "close"}, "closed", "the server closed the connection without an answer"),
    ({"fault": "status"}, "http", "the server answered HTTP 500: the engine is on fire"),
    ({"fault": "status", "status": 404, "message": "The model `x` does not exist."}, "http", "the server answered HTTP 404: The model `x` does not exist."),
    ({"nonsense": 1}, "http", "the server answered HTTP 400: Object contains unknown field `nonsense`"),
    ({"fault": "unauthorized"}, "unauthorized", "the server refused the API key (HTTP 401: Unauthorized); expected it in the environment "
                                                "variable OPENAI_API_KEY, which is not set"),
    ({"fault": "no_stream"}, "not_a_stream", "the answer is no event stream: expected a server that honours 'stream'"),
    ({"fault": "stall"}, "stalled", "no byte came for 0.3 s after 2 tokens"),
    ({"fault": "stall", "at": 0}, "timeout", "the answer was not whole within 1 s; given up before the first token"),
    ({"ttft": 5.0}, "timeout", "the answer was not whole within 1 s; given up before the first token"),
    ({"chunks": 1000, "gap": 0.17}, "timeout", "the answer was not whole within 1 s; given up after 6 tokens"),
    ({"fault": "truncate"}, "truncated", "the connection closed after 2 tokens, before the end of the stream"),
    ({"fault": "truncate", "at": 0}, "truncated", "the connection closed after 0 tokens, before the end of the stream"),
    ({"fault": "end"}, "truncated", "the stream ended after 2 tokens without a finish reason and [DONE]"),
    ({"fault": "no_done"}, "truncated", "the stream ended after 4 tokens without [DONE]"),
    ({"fault": "no_finish"}, "truncated", "the stream ended after 4 tokens without a finish reason"),
    ({"fault": "error"}, "error_event", "the server sent an error after 2 tokens: the engine is on fire"),
    ({"fault": "few"}, "short", "the reply has 4 tokens and its usage says 7"),
    ({"fault": "empty"}, "short", "the reply has no sample: expected 1"),
    ({"fault": "no_usage"}, "no_usage", "the stream has no usage: expected a server that honours stream_options.include_usage"),
]


@pytest.mark.parametrize("script, fault, sentence", FAULTS, ids=[json.dumps(script) for script, *_ in FAULTS])
def test_what_goes_wrong_is_said(server, monkeypatch, script, fault, sentence):
    monkeypatch.delenv(client.KEY_VARIABLE, raising=False)
    began = time.monotonic()
    reply = ask(server.url, request(4, **({"gap": 0.01} | script)), stall_s=0.3, timeout_s=1.0)
    assert (reply.fault, reply.error) == (fault, sentence)
    assert time.monotonic() - began < 1.5
    if "after 2 tokens" in sentence:  # what had come is kept
        assert (len(reply.token_ids), len(reply.chunk_times), reply.last_token) == (2, 2, reply.chunk_times[1])


def test_a_fault_does_not_touch_the_next_request(server):
    async def main():
        one = Client(server.url, stall_s=0.2, timeout_s=0.5)
        replies = []
        for script, *_ in FAULTS:
            if "chunks" not in script:
                await one.complete(request(4, **script))
                replies.append(await one.complete(request(4)))
        await one.close()
        return replies
    assert {reply.error for reply in arrivals.run(main())} == {""}


def test_a_request_may_wait_its_turn_for_longer_than_a_stall(server):
    assert ask(server.url, request(4, ttft=0.8), stall_s=0.2).error == ""


def test_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    reply = ask(url, request())
    assert (reply.fault, reply.error, reply.sent) == ("refused", f"nothing listens at {url} (connection refused)", None)


def test_a_server_that_accepts_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        reply = ask(f"http://127.0.0.1:{deaf.getsockname()[1]}", request(), stall_s=0.1, timeout_s=0.3)
    assert reply.error == "the answer was not whole within 0.3 s; given up before the first token"


STREAM = (b'data: {"choices":[{"text":"a","finish_reason":"stop","token_ids":[1]}]}\n\n'
          b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\ndata: [DONE]\n\n')


@pytest.mark.parametrize("answer, fault, sentence", [
    (b"SSH-2.0-OpenSSH_9.9\r\n", "malformed", "the answer is not HTTP/1.1 ("),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", "malformed", "the answer is not HTTP/1.1 ("),
    (b"HTTP/1.1 503 Busy\r\n\r\nno room", "http", "the server answered HTTP 503: no room"),
    (b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", "http", "the server answered HTTP 302"),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + STREAM, "", ""),
    (b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%b" % (len(STREAM), STREAM), "", ""),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + STREAM[:100], "truncated", "the connection closed after 1 tokens, before the end"),
], ids=["not HTTP", "not chunks", "503 until closed", "302", "until closed", "HTTP/1.0", "cut off"])
def test_other_servers(answer, fault, sentence):
    """What they answer, after which they close the connection."""
    async def main():
        async def talk(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()
        listening = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with listening:
            one = Client(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", stall_s=2)
            return await one.complete(request())
    reply = arrivals.run(main())
    assert reply.fault == fault and reply.error.startswith(sentence)


def test_the_server_dies_during_the_load():
    with scripted_server.running({"gap": 0.01}) as server:
        async def main():
            one = Client(server.url)
            load = asyncio.create_task(arrivals.closed_loop(one.complete, [request(50) for _ in range(200)], 8))
            await asyncio.sleep(0.8)
            server.process.kill()
            return (await load).replies
        replies = arrivals.run(main())
    faults = [r.fault for r in replies]
    assert set(faults) >= {"", "truncated", "refused"} and set(faults) <= {"", "truncated", "closed", "refused"}


def test_the_key_comes_from_the_environment_and_is_never_said(monkeypatch):
    with scripted_server.running(api_key="sk-right") as server:
        monkeypatch.setenv(client.KEY_VARIABLE, "sk-right")
        assert ask(server.url + "/v1/", request()).error == ""
        assert "[key]" in ask(server.url, request(fault="status", status=403, message="wrong key: sk-right")).error
        monkeypatch.setenv(client.KEY_VARIABLE, "sk-wrong")
        said = ask(server.url, request())
        assert said.error == ("the server refused the API key (HTTP 401: Unauthorized); expected it in the environment variable OPENAI_API_KEY, "
                              "which holds a wrong one")
        assert "sk-" not in repr(said)
        monkeypatch.setenv(client.KEY_VARIABLE, "two\nlines")
        with pytest.raises(BadInput, match="^the environment variable OPENAI_API_KEY holds a character that no key has; expected printable ASCII$"):
            Client(server.url)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_a_url_that_cannot_be_one(url):
    with pytest.raises(BadInput, match="^the endpoint is '.*'; expected a URL such as http://127.0.0.1:8000$"):
        Client(url)


def test_a_cancelled_request_leaves_nothing(server):
    async def main():
        one = Client(server.url)
        done = await arrivals.closed_loop(one.complete, [request(fault="stall")], 1, timeout_s=0.2)
        after = await one.complete(request())
        return done, len(one.idle), after
    done, idle, after = arrivals.run(main())
    assert not done.complete and done.replies == [None] and idle == 1 and after.error == ""


LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
VALUES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=30)
EVENTS = st.lists(st.tuples(LINE_ENDS, st.lists(VALUES, max_size=3), st.booleans(), st.sampled_from(["", ": a comment", "id: 7", "retry: 5"])), max_size=12)


def cut(data, places):
    """The bytes in chunks that end at these places."""
    bounds = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.lists(st.integers(0, 2000), max_size=40), st.lists(st.booleans(), min_size=50, max_size=50))
def test_events_may_be_cut_anywhere(events, places, pauses):
    """Whatever the boundaries, also within a character or a CRLF, and however often `take` is called in between:
    the same events, each with the time of the chunk that ended it."""
    data, right, ends = b"", [], []
    for newline, values, space, extra in events:
        lines = [*([extra] if extra else []), *("data:" + (" " if space or value.startswith(" ") else "") + value for value in values)]
        if lines:
            data += (newline.join(lines) + 2 * newline).encode()
        if values:
            right.append("\n".join(values).encode())
            ends.append(len(data))
    chunks = cut(data, places)
    splitter, found, times, waiting, reached = streams.Splitter(), [], [], [], 0
    for number, (chunk, pause) in enumerate(zip(chunks, pauses, strict=False)):
        waiting.append((chunk, reached := reached + len(chunk)))
        if pause or number == len(chunks) - 1:
            got = splitter.take([c for c, _ in waiting], [float(t) for _, t in waiting])
            found, times, waiting = found + got[0], times + got[1], []
    assert found == right
    bounds = np.cumsum([len(c) for c in chunks])
    for at, end, in zip(times, ends, strict=True):
        # A CRLF may be cut: the event is then whole one byte sooner, with its CR.
        assert at in (bounds[np.searchsorted(bounds, end)], bounds[np.searchsorted(bounds, end - 1)])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.integers(1, 4)), min_size=1, max_size=20),
       st.booleans(), LINE_ENDS, st.lists(st.integers(0, 5000), max_size=60))
def test_a_reply_is_the_same_however_it_is_cut(pieces, ascii_only, newline, places):
    """Text, ids and counts, with UTF-8 or escapes, in chunks that end anywhere."""
    events = [{"id": "x", "choices": [{"index": 0, "text": text, "token_ids": list(range(n)), "finish_reason": None}]} for text, n in pieces]
    events[-1]["choices"][0]["finish_reason"] = "stop"
    tokens = sum(n for _, n in pieces)
    events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})
    data = "".join(f"data: {json.dumps(e, ensure_ascii=ascii_only)}{2 * newline}" for e in events) + f"data: [DONE]{2 * newline}"
    chunks = cut(data.encode(), places)
    stream = streams.Stream(streams.Reply())
    stream.take(chunks, [float(i) for i in range(len(chunks))])
    reply = stream.finish()
    assert (reply.text, reply.error, reply.output_tokens) == ("".join(text for text, _ in pieces), "", tokens)
    assert list(reply.chunk_tokens) == [n for _, n in pieces] and list(reply.token_ids) == [i for _, n in pieces for i in range(n)]
    assert list(reply.chunk_times) == sorted(reply.chunk_times)


@pytest.mark.parametrize("data, fault, sentence", [
    (b"data: {oops}\n\n", "malformed", "the stream has an event that is not a completion's JSON ("),
    (b'data: {"choices":[{"text":7}]}\n\n', "malformed", "the stream has an event that is not a completion's JSON (Expected `str | null`, got `int`"),
    (b'data: {"error":"out of memory"}\n\ndata: [DONE]\n\n', "error_event", "the server sent an error after 0 tokens: out of memory"),
    (b'data: {"choices":[{"text":"a","finish_reason":"abort","token_ids":[1]}],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n', "error_event",
     "the server gave the request up after 1 tokens (finish reason 'abort')"),
], ids=["not JSON", "not a completion", "error as text", "abort"])
def test_a_stream_that_is_wrong(data, fault, sentence):
    stream = streams.Stream(streams.Reply())
    stream.take([data], [1.0])
    reply = stream.finish()
    assert reply.fault == fault and reply.error.startswith(sentence)


def test_a_last_event_without_a_token_is_not_one():
    """Some servers send the finish reason in an event of its own."""
    events = [{"choices": [{"text": t, "finish_reason": f}]} for t, f in (("a", None), ("b", None), ("", "stop"))]
    stream = streams.Stream(streams.Reply())
    stream.take([f"data: {json.dumps(e)}\n\n".encode() for e in [*events, {"choices": [], "usage": {"completion_tokens": 2}}]] + [b"data: [DONE]\n\n"],
                [1.0, 2.0, 3.0, 4.0, 5.0])
    reply = stream.finish()
    assert (reply.text, list(reply.chunk_times), reply.last_token, reply.error) == ("ab", [1.0, 2.0], 2.0, "")
