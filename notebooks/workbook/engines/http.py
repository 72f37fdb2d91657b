"""Engines behind an OpenAI-compatible URL: one already running, or several that a run has started."""
import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from typing import Any

import httpx

from workbook import arrivals, client
from workbook.engines.base import Answer, Request
from workbook.errors import BadInput
from workbook.params import Exam

ASK_S = 10
"""Seconds that a server may take to say what it serves."""


class HttpEngine:
    """One or more servers of the same model; each request goes to the one with the fewest under way.

    Attributes:
        load_s: seconds until they answered; 0 for servers that were there before.
    """

    load_s = 0.0

    def __init__(self, exam: Exam, urls: Sequence[str]):
        self._exam, self._urls = exam, [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._served = self._ask_model(self._urls[0])
        self._model = self._served["id"]
        self._under_way = [0] * len(self._urls)
        self._turn = itertools.count()

    def run(self, work: Coroutine) -> Any:
        """Run a load on an event loop; its `answer` calls reach the servers."""
        async def with_clients() -> Any:
            self._clients = [client.Client(url, timeout_s=self._exam.timeout_s, stall_s=client.STALL_S) for url in self._urls]
            try:
                return await work
            finally:
                await asyncio.gather(*(c.close() for c in self._clients))
        return arrivals.run(with_clients())

    async def answer(self, request: Request) -> Answer:
        """Answer one request; one that fails is an answer whose finish reason says why."""
        e, turn = self._exam, next(self._turn)
        count = len(self._urls)
        replica = min(range(count), key=lambda i: (self._under_way[i], (i - turn) % count))
        self._under_way[replica] += 1
        sampling = {"temperature": e.temperature, "top_p": e.top_p, "ignore_eos": e.ignore_eos} | ({"top_k": e.top_k} if e.top_k else {})
        try:
            reply = await self._clients[replica].complete(
                client.Request(request.token_ids, request.max_tokens, self._model, request.seed, sampling, request.arrival))
        finally:
            self._under_way[replica] -= 1
        reason = f"error: {reply.error}" if reply.error else reply.finish_reason or "none"
        # A stream that broke off brought no usage, but some tokens.
        return Answer(request.prompt_id, request.sample, reply.text, reply.token_ids or (), reply.output_tokens or sum(reply.chunk_tokens),
                      reply.prompt_tokens or len(request.token_ids), request.max_tokens, reason,
                      None, None, reply.first_token, reply.last_token, replica, request.arrival, reply.chunk_times)

    def counters(self) -> dict[str, float]:
        """The servers' own counters by name, summed over labels and servers; empty where they publish none."""
        from prometheus_client.parser import text_string_to_metric_families
        totals: dict[str, float] = {}
        for url in self._urls:
            try:
                text = httpx.get(f"{url}/metrics", timeout=ASK_S).raise_for_status().text
            except httpx.HTTPError:
                continue
            for family in text_string_to_metric_families(text):
                if family.type in ("counter", "gauge"):
                    total = sum(s.value for s in family.samples if not s.name.endswith("_created"))
                    totals[family.name] = totals.get(family.name, 0.0) + total
        return totals

    @property
    def metrics_urls(self) -> list[str]:
        """Where the servers say how full their KV cache is."""
        return self._urls

    def kv_cache_peak(self) -> None:
        """Not known here: the telemetry asks the servers during the load."""

    def window(self) -> int:
        """The most tokens a sequence may have; 0 where the server does not say."""
        return int(self._served.get("max_model_len") or 0)

    def attention_backend(self) -> str:
        """A server does not tell."""
        return "unknown"

    def close(self) -> None:
        """Leave the servers as they are."""

    def _ask_model(self, url: str) -> dict[str, Any]:
        """What the server says of its first model.

        Raises:
            BadInput: nothing answers there, the key is refused, or it is no such server.
        """
        where = f"key 'endpoint' is {url!r}"
        try:
            reply = httpx.get(f"{url}/v1/models", timeout=ASK_S, headers={"Authorization": f"Bearer {key}"} if (key := client.api_key()) else {})
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BadInput(f"{where}: no server answers there ({type(error).__name__}: {error}); expected the URL of an OpenAI-compatible server that runs") from None
        if reply.status_code in (401, 403):
            raise BadInput(f"{where}: the server refused the API key (HTTP {reply.status_code}); expected it in the environment variable {client.KEY_VARIABLE}")
        try:
            return reply.raise_for_status().json()["data"][0]
        except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
            raise BadInput(f"{where}: /v1/models answers HTTP {reply.status_code} and no list of models; expected an OpenAI-compatible server") from None
