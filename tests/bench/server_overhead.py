"""What does the workbook's client cost a server? Output tok/s of a closed loop against vLLM's serving benchmark.

One server, started by the workbook, answers the same token ids with the same number of tokens, greedily, alternately
driven by the workbook (`load.measure`) and by the `benchmark` behind `vllm bench serve` with its `openai` back end,
at each number of requests under way. Both report output tokens / (first request to the last answer). Exits with 1 if
the bar of `pairs` is missed. About fifteen minutes on two cores.

    python tests/bench/server_overhead.py [--run sharegpt-smollm2] [--pairs 10] [--concurrency 1 8 32]
"""
import argparse
import asyncio
import contextlib
import io
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pairs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import engines, exams, load, metrics, models, params, progress, subjects, tokens  # noqa: E402

SIZES = {1: (1, 64), 8: (8, 48), 32: (32, 48)}
"""Requests and output tokens each, by the number under way; of another number, as many requests as that. A pass of a second or two."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="sharegpt-smollm2")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(SIZES))
    args = parser.parse_args()

    os.environ[progress.TERMINAL] = ""  # no bar on either side
    sizes = {c: SIZES.get(c, (c, 48)) for c in args.concurrency}
    closed = {"engine": "server", "load": "closed", "concurrency": args.concurrency, "gates": {}, "num_prompts": max(n for n, _ in sizes.values())}
    exam = params.check(exams.resolve(args.run).values | closed)
    model = models.resolve(exam)
    asked = load.requests(exam, subjects.questions(exam, tokens.Tokenizer(model)))
    engine = engines.start(exam, model, Path(tempfile.mkdtemp()) / "engine.log")
    found = {}
    try:
        for concurrency, (count, length) in sizes.items():
            batch = [replace(r, max_tokens=length) for r in asked[:count]]
            print(f"\n{args.run}: {count} requests of {length} output tokens, {concurrency} at a time")
            found[f"server against vllm.benchmarks.serve, {concurrency} at a time"] = pairs.alternate(
                lambda c=concurrency, b=batch: _ours(engine, exam.model_copy(update={"concurrency": [c]}), b),
                lambda c=concurrency, b=batch: _theirs(engine, exam, b, c), args.pairs)
    finally:
        engine.close()
    return pairs.report(found)


def _ours(engine, exam, batch) -> float:
    (done,) = load.measure(engine, exam, batch, 1)
    frame = load.requests_frame([done])
    assert frame.output_tokens.sum() == sum(r.max_tokens for r in batch), frame.finish_reason.tolist()
    return metrics.of_repetition(frame)["output_tok_s"]


def _theirs(engine, exam, batch, concurrency) -> float:
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    requests = [SampleRequest(prompt=r.token_ids, prompt_len=len(r.token_ids), expected_output_len=r.max_tokens) for r in batch]
    with contextlib.redirect_stdout(io.StringIO()):
        # The defaults of `vllm bench serve --backend openai`; no request to see whether the server is up.
        said = asyncio.run(serve.benchmark(
            serve.TaskType.GENERATION, "openai", f"{engine._urls[0]}/v1/completions", engine._urls[0], engine._model, engine._model, None, requests,
            logprobs=None, request_rate=float("inf"), burstiness=1.0, disable_tqdm=True, num_warmups=0, profile=False,
            selected_percentile_metrics=["ttft", "tpot", "itl"], selected_percentiles=[99.0], ignore_eos=exam.ignore_eos, goodput_config_dict={},
            max_concurrency=concurrency, lora_modules=None, extra_headers=None, extra_body={"temperature": exam.temperature}, ready_check_timeout_sec=0))
    assert said["total_output_tokens"] == sum(r.max_tokens for r in batch), said.get("errors")
    return said["output_throughput"]


if __name__ == "__main__":
    sys.exit(main())
