"""How long does scoring take? 100,000 answers of 400 tokens (1,600 characters) by every scorer, on one core.

The answers are made up: sums in sentences, ended in one of the forms in which models state an answer. Prints the CPU
time of each scorer, and whether all together stay under the bar.

    python tests/bench/scoring.py [--answers 100000]
"""
import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import scorers  # noqa: E402

BAR_S, CHARACTERS = 20.0, 1600
ENDS = ["\n#### {}", "\nThe answer is {}.", "\nSo she has {} eggs left.", "\n\\[ \\boxed{{{}}} \\]", "\n**Answer:** ${}.00", "\nTherefore, it takes **{}** minutes."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100_000)
    args = parser.parse_args()
    draw = random.Random(0)
    answers, golds = zip(*(_answer(draw) for _ in range(args.answers)))
    total = 0.0
    for name, scorer in scorers.SCORERS.items():
        began = time.process_time()
        right = sum(map(scorer, answers, golds))
        took = time.process_time() - began
        total += took
        print(f"{name:17} {took:6.2f} s   {right / args.answers:.1%} right", flush=True)
    print(f"bar: {args.answers:,} answers under {BAR_S:.0f} s: {'holds' if total < BAR_S else 'missed'} ({total:.1f} s)")
    return int(total >= BAR_S)


def _answer(draw: random.Random) -> tuple[str, str]:
    text = ""
    while len(text) < CHARACTERS:
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        text += draw.choice([f"First, she buys {a} boxes of {b} eggs each, so there are {a} * {b} = {a * b} eggs.\n",
                             f"That costs ${a}.50 a box, and {b} % of it is a discount. ", f"{len(text) % 9}. **Then** {a} + {b} = {a + b}, which is more than {a}.\n"])
    return text[:CHARACTERS] + draw.choice(ENDS).format(a), f"<<{a}>>\n#### {a}"


if __name__ == "__main__":
    sys.exit(main())
