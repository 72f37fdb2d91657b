"""How often do the signs of degeneration occur, where nothing is broken and where something is? What the ceilings rest on.

Answers of the embedded model to the exams `smoke` and `verl-smollm2-gsm-symbolic`: with its own weights, with random ones,
at temperature 5, cut at 3 tokens, and greedily although samples were asked for. Prints a row a case with the rate of each
sign and the mean log-probability that the weights give plain English (`canary`), and exits with 1 unless every fault of
the first exam and random weights in either, and nothing else, are above a ceiling or below the canary's bar. Four minutes on two cores.

    python tests/bench/degenerate_rates.py [smoke] [verl-smollm2-gsm-symbolic]
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "tests")]
from workbook import canary, degeneration, embedded, exams, load, models, paths, subjects, tokens  # noqa: E402

RUNS = ("smoke", "verl-smollm2-gsm-symbolic")
CASES = {"as it is": {}, "temperature 5": {"temperature": 5.0}, "max_tokens 3": {"max_tokens": 3}, "greedy samples": {"temperature": 0.0}}
"""What the engine samples with, whatever it is asked."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer", nargs=3, metavar=("RUN", "MODEL", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("runs", nargs="*", default=RUNS, help="which of the two exams (default: both)")
    args = parser.parse_args()
    if args.answer:
        return answer(*args.answer)
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        import broken_models
        folders = {"real": embedded.prepare(), "random": broken_models.random_weights(embedded.prepare(), Path(scratch) / "random")}
        for run in args.runs:
            print(f"\n{run}: {exams.load(run).title}\n{'case':28}" + "".join(f"{name:>15}" for name in degeneration.watched(exams.load(run))) + f"{'canary':>9}")
            for weights, folder in folders.items():
                file = Path(scratch) / f"{run}-{weights}.pickle"
                subprocess.run([sys.executable, __file__, "--answer", run, str(folder), str(file)], env=paths.child_environment(), check=True)
                for case, (generations, read) in pd.read_pickle(file).items():
                    wrong += judge(run, weights, case, generations, read, folder)
    print(f"\n{'; '.join(wrong) or 'what has to be INVALID is, and nothing else'}")
    return int(bool(wrong))


def judge(run: str, weights: str, case: str, generations: pd.DataFrame, read: list[list[float]], folder: Path) -> list[str]:
    """Print a row; a sentence if the case is judged wrongly."""
    exam, tokenizer = exams.load(run), tokens.Tokenizer(folder)
    found = degeneration.tally(exam, generations.join(degeneration.signs(exam, generations, tokenizer.special(), tokenizer.ends())))
    problems = degeneration.problems(exam, found) + canary.problems(read, tokenizer.vocabulary)
    print(f"{weights + ', ' + case:28}" + "".join(f"{f'{t.count}/{t.of} {t.share:.1%}':>15}" for t in found.values())
          + f"{canary.mean(read):9.3f}  {'INVALID: ' + '; '.join(problems) if problems else 'valid'}", flush=True)
    if weights == "real" and case != "as it is" and run != "smoke":
        return []  # all of this exam's answers are cut off as they are, its tokens are the 50 likeliest ones, and four questions are few: its golden is needed
    faulty = weights == "random" or case != "as it is"
    return [f"{run}, {weights}, {case}: {problems or 'valid'}"] if bool(problems) != faulty else []


def answer(run: str, model: str, file: str) -> int:
    """Answers to a run's questions in every case, by one engine, into a file."""
    import faulty_engine

    from workbook.engines.offline import OfflineEngine
    exam = exams.load(run, exams.parse_set("", model))
    folder = models.resolve(exam)
    tokenizer = tokens.Tokenizer(folder)
    engine = OfflineEngine(exam, folder, Path(file).with_suffix(".log"), in_process=True)
    read = engine.logprobs(canary.sequences(tokenizer))
    asked, found = subjects.questions(exam, tokenizer, models.window(exam, folder)), {}
    faulty_engine.load()
    for case, changes in CASES.items():
        faulty_engine.FAULTS = changes
        done = load.Repetition(1, 0, 0.0, 0.0, engine.generate(load.requests(exam, asked)), {})
        found[case] = (load.generations_frame(done, asked), read)
    pd.to_pickle(found, file)
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
