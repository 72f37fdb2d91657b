"""What does the workbook's own measuring cost? Output tok/s of its offline engine against vLLM's benchmark.

The same engine answers the same requests, alternately driven by the workbook (`load.measure`, with its
counters and per-request times) and by the function behind `vllm bench throughput`: the exam's first requests, cut
to so few tokens that a pass takes a second or two. Exits with 1 if the bar of `pairs` is missed. About eight minutes on two cores.

    python tests/bench/offline_overhead.py [--run sharegpt-smollm2] [--pairs 10] [--requests 8] [--tokens 48]
"""
import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pairs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import engines, exams, load, metrics, models, subjects, tokens  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="sharegpt-smollm2")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()

    exam = exams.load(args.run)
    model = models.resolve(exam)
    questions = subjects.questions(exam, tokens.Tokenizer(model))
    batch = [replace(r, seed=None, max_tokens=args.tokens) for r in load.requests(exam, questions)[:args.requests]]
    engine = engines.start(exam, model, Path(tempfile.mkdtemp()) / "engine.log")
    # The peer always samples at temperature 1 without seeds, to the limit: so do we here, on the exam's own engine.
    engine._exam = exam.model_copy(update={"temperature": 1.0, "ignore_eos": True})
    peer_requests = _peer_requests(batch)
    try:
        print(f"{args.run}: {len(batch)} requests, {sum(r.max_tokens for r in batch):,} output tokens")
        ratios = pairs.alternate(lambda: _ours(engine, batch), lambda: _theirs(engine, peer_requests), args.pairs)
    finally:
        engine.close()
    return pairs.report({"offline against vllm.benchmarks.throughput": ratios})


def _ours(engine, batch) -> float:
    (done,) = load.measure(engine, engine._exam, batch, 1)
    return metrics.of_repetition(load.requests_frame([done]))["output_tok_s"]


def _peer_requests(batch):
    from vllm.benchmarks.datasets import SampleRequest
    return [SampleRequest(prompt={"prompt_token_ids": r.token_ids}, prompt_len=len(r.token_ids), expected_output_len=r.max_tokens) for r in batch]


def _theirs(engine, requests) -> float:
    from vllm.benchmarks import throughput
    seconds, outputs = throughput._run_vllm_requests(engine._llm, requests, 1, disable_detokenize=False, do_profile=False,
                                                     prequeue_requests=False, enable_lora=False)
    return sum(len(o.outputs[0].token_ids) for o in outputs) / seconds


if __name__ == "__main__":
    sys.exit(main())
