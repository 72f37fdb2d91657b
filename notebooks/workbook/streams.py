"""The stream of one answer: server-sent events out of bytes, and a reply with its times out of events."""
import itertools
import re
from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(slots=True)
class Reply:
    """What came of one request. Times are seconds of `time.monotonic`; None where it never came so far.

    Attributes:
        token_ids: None if the server returns none.
        prompt_tokens, output_tokens: as the server's usage says.
        sent: when the request was handed to an open connection.
        chunk_times: when each event with a token arrived.
        chunk_tokens: tokens in each of them; 1 each if the server returns no ids.
        fault: one word: refused, unreachable, closed, http, unauthorized, not_a_stream, stalled, timeout,
            truncated, error_event, malformed, no_usage, short; empty if all is well.
        error: the fault as a sentence.
    """
    text: str = ""
    token_ids: array | None = field(default=None, repr=False)
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    arrival: float | None = None
    sent: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    chunk_times: array = field(default_factory=lambda: array("d"), repr=False)
    chunk_tokens: array = field(default_factory=lambda: array("I"), repr=False)
    fault: str = ""
    error: str = ""


class _Choice(msgspec.Struct, gc=False):
    text: str | None = ""
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_EVENTS = msgspec.json.Decoder(list[_Event])
_BLANK_LINE = re.compile(rb"(?:(?>\r\n|\r|\n)){2}")  # atomic, or the two halves of a CRLF would be two line ends


class Splitter:
    """Server-sent events out of chunks that may end anywhere (WHATWG HTML, 9.2: LF, CRLF or CR end a line)."""

    def __init__(self):
        self._rest, self._rest_time = b"", 0.0

    def take(self, chunks: list[bytes], times: list[float]) -> tuple[list[bytes], list[float]]:
        """The next chunks and when each came; returns the data of the events that are whole by now and when the
        last byte of each came. Comments and other fields are dropped; what is left of an event waits."""
        if self._rest:
            chunks, times = [self._rest, *chunks], [self._rest_time, *times]
        data = b"".join(chunks)
        if data.count(b"\n") == 2 * len(chunks) and b"\r" not in data:
            # What vLLM sends, and nearly always what arrives: one event of one line in every chunk.
            found = [chunk[6:-2] for chunk in chunks if chunk.startswith(b"data: ") and chunk.endswith(b"\n\n")]
            if len(found) == len(chunks):
                self._rest = b""
                return found, times
        return self._any(data, chunks, times)

    def _any(self, data: bytes, chunks: list[bytes], times: list[float]) -> tuple[list[bytes], list[float]]:
        found, found_times, start = [], [], 0
        bounds = zip(itertools.accumulate(map(len, chunks)), times, strict=True)
        bound, at = 0, 0.0
        for match in _BLANK_LINE.finditer(data):
            event, start = data[start:match.start()], match.end()
            while bound < start:
                bound, at = next(bounds)
            lines = [line[5:].removeprefix(b" ") for line in event.replace(b"\r", b"\n").split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
                found_times.append(at)
        self._rest = data[start:]
        if self._rest:
            self._rest_time = times[-1]
        return found, found_times


class Stream:
    """The events of one answer, which become its Reply."""

    def __init__(self, reply: Reply):
        self.reply, self._splitter = reply, Splitter()
        self._texts: list[str] = []
        self._done = self._sampled = False
        self._usage: _Usage | None = None

    @property
    def tokens(self) -> int:
        """How many have come."""
        return sum(self.reply.chunk_tokens)

    def take(self, chunks: list[bytes], times: list[float]) -> None:
        """The next chunks of the body, and when each came."""
        events, times = self._splitter.take(chunks, times)
        if b"[DONE]" in events:
            self._done = True
            del events[events.index(b"[DONE]"):]
        try:
            # One call for all of them: most of what is in an event is the same every time, and skipped.
            parsed = _EVENTS.decode(b"[%b]" % b",".join(events))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self.fail("malformed", f"the stream has an event that is not a completion's JSON ({error})")
        for event, at in zip(parsed, times, strict=False):  # [DONE] has a time and is no event
            if event.choices:
                self._take_choice(event.choices[0], at)
            if event.usage:
                self._usage = event.usage
            if event.error:
                return self.fail("error_event", f"the server sent an error after {self.tokens} tokens: {message(event.error)}")

    def _take_choice(self, choice: _Choice, at: float) -> None:
        reply, ids, self._sampled = self.reply, choice.token_ids, True
        self._texts.append(choice.text or "")
        if choice.finish_reason:
            reply.finish_reason = choice.finish_reason
        if ids:
            if reply.token_ids is None:
                reply.token_ids = array("I")
            reply.token_ids.extend(ids)
        if ids != []:
            reply.chunk_times.append(at)
            reply.chunk_tokens.append(1 if ids is None else len(ids))

    def fail(self, fault: str, sentence: str) -> None:
        """Note what went wrong, if it is the first thing."""
        if not self.reply.fault:
            self.reply.fault, self.reply.error = fault, sentence

    def finish(self, fault: str = "", sentence: str = "") -> Reply:
        """The stream has ended; `fault` and `sentence` say why, if not for good."""
        reply, usage = self.reply, self._usage
        reply.text = "".join(self._texts)
        times, complete = reply.chunk_times, self._done and reply.finish_reason is not None
        ended = times[-1] if times else None
        if reply.token_ids is None and usage and len(times) == usage.completion_tokens + 1 and not self._texts[-1]:
            # Some servers end with an event that has a finish reason and no token.
            times.pop()
            reply.chunk_tokens.pop()
        if times:
            reply.first_token, reply.last_token = times[0], times[-1]
        elif complete and not reply.token_ids:  # an empty answer came when it ended
            reply.first_token = reply.last_token = ended
        reply.prompt_tokens, reply.output_tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, self.tokens)
        if fault and not (complete and usage):
            self.fail(fault, sentence)
        elif self._done and usage and not self._sampled:
            self.fail("short", "the reply has no sample: expected 1")
        elif not complete:
            missing = " and ".join(name for name, there in (("a finish reason", reply.finish_reason), ("[DONE]", self._done)) if not there)
            self.fail("truncated", f"the stream ended after {self.tokens} tokens without {missing}")
        elif reply.finish_reason in ("abort", "error"):
            self.fail("error_event", f"the server gave the request up after {self.tokens} tokens (finish reason {reply.finish_reason!r})")
        elif usage is None:
            self.fail("no_usage", "the stream has no usage: expected a server that honours stream_options.include_usage")
        elif self.tokens != usage.completion_tokens and reply.token_ids is not None:
            self.fail("short", f"the reply has {self.tokens} tokens and its usage says {usage.completion_tokens}")
        return reply


def message(found: Any) -> str:
    """The words in a server's error, whatever its form."""
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            return message(found[name])
    return found if isinstance(found, str) else msgspec.json.encode(found).decode()
