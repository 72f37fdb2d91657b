"""Engines behind an OpenAI-compatible URL: one already running, or several that a run has started."""
import asyncio
import itertools
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx

from workbook import arrivals, client, metrics
from workbook.engines.base import Answer, Request
from workbook.errors import BadInput
from workbook.params import Exam

ASK_S = 10
"""Seconds that a server may take to say what it serves. It is asked without the environment's proxies (`trust_env`), as the
load reaches it: none of them would find loopback."""

PROBE_S = 30
"""Seconds for the request that finds out what the server takes."""
REFUSALS = tuple(f"the server answered HTTP {status}" for status in (400, 422))
"""How a reply's error begins where the server does not take a request's fields."""
VLLM_ONLY = {"top_k", "ignore_eos"}
"""Fields of a request that OpenAI's API does not have."""
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What a vLLM server takes from the model's generation_config.json where a request leaves it out. The other engines do not, and
an exam's sampling is all that there is."""


def sampling(exam: Exam) -> dict[str, Any]:
    """An exam's sampling as fields of a request; what only vLLM has, only where it changes something."""
    found = {"temperature": exam.temperature, "top_p": exam.top_p, "top_k": exam.top_k, "ignore_eos": exam.ignore_eos}
    return {name: value for name, value in found.items() if value or name not in VLLM_ONLY}


def _refusal(reply: client.Reply) -> str:
    """Why the server refuses the request's fields; empty if it does not."""
    return reply.error if reply.error.startswith(REFUSALS) else ""


class HttpEngine:
    """One or more servers of the same model; each request goes to the one with the fewest under way.

    Attributes:
        load_s: seconds until they answered; 0 for servers that were there before.
        serves: what the server calls its model.
    """

    load_s = 0.0

    def __init__(self, exam: Exam, urls: Sequence[str]):
        self._exam, self._urls = exam, [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._served = self._ask_model(self._urls[0])
        self._model = self.serves = self._served["id"]
        self._under_way = [0] * len(self._urls)
        self._turn = itertools.count()
        # The gaps between events that hold many tokens are no time between tokens.
        interval = exam.engine_args.get("stream_interval", 1)
        self._each_token = interval == 1
        self._stall_s = client.STALL_S + (interval - 1 if isinstance(interval, int) else 0)  # a second for each more token that an event holds
        self._sampling, self._token_ids = NEUTRAL | sampling(exam), True
        if exam.engine == "endpoint":
            self._sampling, self._token_ids = self._taken(sampling(exam))

    def run(self, work: Callable[[], Coroutine], at_once: int = 0) -> Any:
        """Run a load on an event loop; its `answer` calls reach the servers, over connections that are open before it begins where so
        many of its requests are due at once."""
        async def with_clients() -> Any:
            self._clients = [client.Client(url, timeout_s=self._exam.timeout_s, stall_s=self._stall_s, token_ids=self._token_ids) for url in self._urls]
            try:
                await asyncio.gather(*(c.open(math.ceil(at_once / len(self._urls))) for c in self._clients))
                return await work()
            finally:
                await asyncio.gather(*(c.close() for c in self._clients))
        return arrivals.run(with_clients())

    async def answer(self, request: Request) -> Answer:
        """Answer one request; one that fails is an answer whose finish reason says why."""
        turn, count = next(self._turn), len(self._urls)
        replica = min(range(count), key=lambda i: (self._under_way[i], (i - turn) % count))
        self._under_way[replica] += 1
        try:
            reply = await self._clients[replica].complete(
                client.Request(request.token_ids, request.max_tokens, self._model, request.seed, self._sampling, request.arrival))
        finally:
            self._under_way[replica] -= 1
        reason = f"error: {reply.error}" if reply.error else reply.finish_reason or "none"
        # A stream that broke off brought no usage, but some tokens.
        return Answer(request.prompt_id, request.sample, reply.text, reply.token_ids or (), reply.output_tokens or sum(reply.chunk_tokens),
                      reply.prompt_tokens or len(request.token_ids), request.max_tokens, reason,
                      None, None, reply.first_token, reply.last_token, replica, request.arrival, reply.chunk_times if self._each_token else ())

    def counters(self) -> dict[str, float]:
        """vLLM's own counters by name, summed over labels and servers, and the seconds of `metrics.SECONDS`; empty where one of the
        servers does not publish them, or not just now: the sum of some would pass for that of all."""
        from prometheus_client.parser import text_string_to_metric_families
        totals: dict[str, float] = {}
        for url in self._urls:
            try:
                families = list(text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=ASK_S, trust_env=False).raise_for_status().text))
            except (httpx.HTTPError, ValueError):  # ValueError: a page that is no list of metrics
                return {}
            for family in families:
                samples = [s for s in family.samples if not s.name.endswith("_created")]
                if family.type == "histogram":  # its sum: the seconds of all requests
                    samples = [s for s in samples if s.name.endswith("_sum")]
                total = sum(s.value for s in samples)
                if family.name.startswith("vllm:") and (family.type in ("counter", "gauge") or family.name in metrics.SECONDS) and math.isfinite(total):
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

    def slots(self) -> int:
        """Requests that may run at once, in all servers together; 0 where the exam does not say, since no server does."""
        stated, parallel = (self._exam.engine_args.get(name, default) for name, default in (("max_num_seqs", 0), ("data_parallel_size", 1)))
        known = self._exam.engine == "server" and isinstance(stated, int) and isinstance(parallel, int)
        return stated * parallel * self._exam.replicas if known else 0

    def attention_backend(self) -> str:
        """A server does not tell."""
        return "unknown"

    def close(self) -> None:
        """Leave the servers as they are."""

    def _taken(self, wanted: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """The fields that a request to this server has, and whether it gives the ids of its tokens, which is what tells vLLM
        (others take `return_token_ids` and leave it out): found out by requests of one token, which
        nobody measures. Where it does not, its usage says how many tokens there were.

        Args:
            wanted: the exam's `sampling`.

        Raises:
            BadInput: it refuses the key, or a field that the exam needs. (Any other fault is the load's to find.)
        """
        for fields, token_ids in ((NEUTRAL | wanted, True), (wanted, True), (wanted, False)):
            reply = self._probe(fields, token_ids)
            if not (refused := _refusal(reply)) and (reply.error or reply.token_ids is not None or not token_ids):
                return fields, token_ids
        where = f"key 'endpoint' is {self._urls[0]!r}"
        if plain := _refusal(self._probe({name: value for name, value in wanted.items() if name not in VLLM_ONLY}, False)):
            raise BadInput(f"{where}: {plain}; expected a server that completes a prompt of token ids")
        for name in VLLM_ONLY & wanted.keys():
            if alone := _refusal(self._probe({name: wanted[name]}, False)):
                raise BadInput(f"key '{name}' is {str(wanted[name]).lower()}: {alone}; expected an endpoint that takes the field '{name}', as vLLM does")
        raise BadInput(f"{where}: {refused}; expected a server that takes the exam's sampling parameters")

    def _probe(self, fields: dict[str, Any], token_ids: bool) -> client.Reply:
        """What comes of a request of one token with these fields."""
        async def ask() -> client.Reply:
            probe = client.Client(self._urls[0], timeout_s=PROBE_S, token_ids=token_ids)
            try:
                return await probe.complete(client.Request([1], 1, self._model, sampling=fields))
            finally:
                await probe.close()
        reply = arrivals.run(ask())
        if reply.fault == "unauthorized":
            raise BadInput(f"key 'endpoint' is {self._urls[0]!r}: {reply.error}")
        return reply

    def _ask_model(self, url: str) -> dict[str, Any]:
        """What the server says of the exam's model: its only one, or that which has the name of key 'model', by its own
        or by what it was loaded from (`root`, which vLLM says).

        Raises:
            BadInput: nothing answers there, the key is refused, it is no such server, or it serves several others.
        """
        where = f"key 'endpoint' is {url!r}"
        try:
            reply = httpx.get(f"{url}/v1/models", timeout=ASK_S, trust_env=False, headers={"Authorization": f"Bearer {key}"} if (key := client.api_key()) else {})
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BadInput(f"{where}: no server answers there ({type(error).__name__}: {error}); expected the URL of an OpenAI-compatible server that runs") from None
        if reply.status_code in (401, 403):
            raise BadInput(f"{where}: the server refused the API key (HTTP {reply.status_code}); expected it in the environment variable {client.KEY_VARIABLE}")
        try:
            served = reply.raise_for_status().json()["data"]
            names, own = [entry["id"] for entry in served], (self._exam.model, self._exam.model.partition("@")[0])
            first = served[0]
        except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
            raise BadInput(f"{where}: /v1/models answers HTTP {reply.status_code} and no list of models; expected an OpenAI-compatible server") from None
        if len(served) == 1 or self._exam.engine != "endpoint":  # a server of this run's lists its model first, then the adapter
            return first
        for entry in served:
            if entry["id"] in own or entry.get("root") in own:
                return entry
        raise BadInput(f"key 'model' is {self._exam.model!r}: {url} serves {', '.join(names)}; expected one of these")
