"""The command line: `python -m workbook COMMAND`. `make help` lists the same things for people."""
import argparse
import errno
import os
import shlex
import sys
import traceback
from pathlib import Path

from workbook.errors import BadInput
from workbook.statuses import strict

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What is the matter with a place, and not with this program."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 nothing regressed, 1 regressed, 2 error or invalid run."""
    try:
        args = _parser().parse_args(argv)
        return args.command(args)
    except BadInput as error:
        print(f"goldbook: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in UNWRITABLE:
            traceback.print_exc()
        else:
            from workbook import paths
            print(f"goldbook: {error.filename or paths.reports()}: cannot be written ({error.strerror}); GOLDBOOK_REPORTS names another folder for the reports", file=sys.stderr)
        return 2
    except Exception:
        # Python's own code for this is 1, which here means REGRESSED.
        traceback.print_exc()
        return 2
    except KeyboardInterrupt:
        print("goldbook: interrupted; results so far are in the reports folder", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workbook", description="Did generation break, get slower, or get worse?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        return command
    add("prepare", _prepare, "unpack the embedded model into the cache")
    add("run-all", _run_all, "every exam this machine can take, then the summary")
    add("summary", _summary, "rebuild the summary from the runs there are")
    add("list", _list, "every exam, what it needs, and whether this machine can take it")
    add("reference", _reference, "the page on all parameters, made from the schema")
    for name, function, text in (("run", _run, "one exam, then the summary"), ("record", _record, "measure a candidate golden"),
                                 ("params", _params, "a run's flat parameters, and where each value comes from"),
                                 ("ab", _ab, "two variants of an exam in turns on this machine: does B cost anything?"),
                                 ("tune", _tune, "an exam with every setting of its sweep: which are the fastest?")):
        command = add(name, function, text)
        command.add_argument("run", help="stem of a file in params/, with @variant where it has some")
        command.add_argument("--model", help="another model: a local folder, or one of the hub")
        command.add_argument("--set", default="", help='other parameters: "n=8 engine_args.max_num_seqs=64"')
        if name == "record":
            command.add_argument("--sessions", type=_whole("SESSIONS"), help="engine sessions (default 3)")
            command.add_argument("--add", action="store_true", help="put them to the candidate that is there")
            command.add_argument("--from", dest="places", metavar="FILES", help='measure nothing, and take the sessions of these candidates: "a.json b.json"')
        if name == "ab":
            for side in ("a", "b"):
                command.add_argument(f"--{side}", default="", metavar="SET", help=f"what {side.upper()} changes, as in --set (default: nothing)")
                command.add_argument(f"--python-{side}", default="", metavar="PYTHON", help=f"interpreter of {side.upper()}'s environment (default: this one)")
            command.add_argument("--pairs", type=_whole("PAIRS"), default=8, help="visits of each variant, even, at least 8 (default 8)")
        if name == "tune":
            command.add_argument("--rounds", type=_whole("ROUNDS"), help="visits of each setting (default 1)")
            command.add_argument("--only", default="", metavar="SETTINGS", help='names of the settings to take: "a b" (default: all)')
            command.add_argument("--add", action="store_true", help="go on with the latest one, which was cut off")
    command = add("bless", _bless, "make the candidate the golden")
    command.add_argument("run")
    command.add_argument("--reason", required=True, help="why, in a sentence")
    command.add_argument("--accept-regression", action="store_true", help="although it is worse than what it replaces")
    command = add("schema", _schema, "the JSON Schema of a kind of file")
    command.add_argument("name", choices=["golden", "result"])
    command = add("diff", _diff, "hold one stored run against another, with the rule of the goldens")
    command.add_argument("a", help="the one to compare with: name of a run, folder of a stored run, or file of a golden")
    command.add_argument("b", help="the one that is judged, likewise")
    command = add("import-golden", _import_golden, "make a golden in one of Megatron's formats that of a run, for gates with rule: band")
    command.add_argument("file", type=Path)
    command.add_argument("--run", required=True, help="stem of a file in params/, with @variant where it has some")
    command.add_argument("--platform", required=True, help="the platform's name, a folder of goldens/")
    command.add_argument("--of", default="", help="whose part of a file with several platforms counts")
    command = add("judge-band", _judge_band, "Megatron's rule on two files in its formats: 0 in the band, 1 not")
    command.add_argument("golden", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument("--platform", default="", help="whose part of a file with several platforms counts")
    command.add_argument("--low", type=float, default=0.9, help="lowest rate that passes, as a fraction of the golden (default 0.9)")
    command.add_argument("--high", type=float, default=1.2, help="lowest rate that is too fast (default 1.2)")
    return parser


def _whole(name: str):
    """How an argument that `make` calls so is read: a whole number."""
    def read(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise BadInput(f"{name} is {text!r}; expected a whole number") from None
    return read


def _overrides(args: argparse.Namespace):
    from workbook import exams
    return exams.parse_set(args.set, args.model or "")


def _prepare(args: argparse.Namespace) -> int:
    from workbook import embedded
    embedded.prepare()
    return 0


def _params(args: argparse.Namespace) -> int:
    from workbook import catalogue
    print(catalogue.flat_with_origins(args.run, _overrides(args)), end="")
    return 0


def _list(args: argparse.Namespace) -> int:
    from workbook import catalogue
    print(catalogue.listing(), end="")
    return 0


def _reference(args: argparse.Namespace) -> int:
    from workbook import catalogue
    print(catalogue.reference(), end="")
    return 0


def _run_all(args: argparse.Namespace) -> int:
    from workbook import runner
    return _executing(lambda: runner.run_all(strict()))


def _run(args: argparse.Namespace) -> int:
    from workbook import runner
    return _executing(lambda: runner.run(args.run, _overrides(args), strict()))


def _record(args: argparse.Namespace) -> int:
    from workbook import candidates, recording
    if args.places is None:
        sessions = candidates.SESSIONS if args.sessions is None else args.sessions
        done = _executing(lambda: recording.record(args.run, _overrides(args), sessions, args.add))
    else:
        _refuse(args, "FROM takes the sessions that are in its files", ("SESSIONS", "MODEL", "SET"))
        done = recording.pool(args.run, _words("FROM", args.places), args.add)
    print(f"candidate: {candidates.path_of(args.run)}, {len(done.sessions)} session{'' if len(done.sessions) == 1 else 's'}", file=sys.stderr)
    for problem in done.problems:
        print(f"cannot be blessed: {problem}", file=sys.stderr)
    missing = "; ".join(candidates.shortage(done))
    if not done.problems:
        print(missing or f"make it the golden with: make bless RUN={args.run} REASON=\"...\"", file=sys.stderr)
    return 2 if done.problems else 0


def _ab(args: argparse.Namespace) -> int:
    from workbook import ab
    pythons = {"a": args.python_a, "b": args.python_b}
    return _executing(lambda: ab.take(args.run, {"a": args.a, "b": args.b}, pythons, args.pairs, _overrides(args), strict()))


def _tune(args: argparse.Namespace) -> int:
    from workbook import tune
    if not args.add:
        return _executing(lambda: tune.take(args.run, 1 if args.rounds is None else args.rounds, args.only, _overrides(args), strict()))
    _refuse(args, "ADD=1 goes on with the plan of the latest tuning", ("ROUNDS", "ONLY", "MODEL", "SET"))
    return _executing(lambda: tune.go_on(args.run, strict()))


def _refuse(args: argparse.Namespace, why: str, words: tuple[str, ...]) -> None:
    """Refuse what was given beside an option that leaves no room for it."""
    if given := [word for word in words if getattr(args, word.lower())]:
        raise BadInput(f"{', '.join(given)}: {why}; expected nothing else that would change it")


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{name} is {text!r}: {error}; expected words, in quotes where one has a space") from None


def _executing(work):
    """Do work that starts notebooks; whatever becomes of it, no process of theirs is left."""
    from workbook import executor
    executor.adopt_orphans()
    with executor.interruptible():
        try:
            return work()
        finally:
            executor.end_processes()


def _bless(args: argparse.Namespace) -> int:
    from workbook import candidates, platforms
    by = platforms.git("config", "user.name") or os.environ.get("USER", "unknown")
    print(f"golden: {candidates.bless(args.run, args.reason, by, accept_regression=args.accept_regression)}", file=sys.stderr)
    return 0


def _schema(args: argparse.Namespace) -> int:
    from workbook import schemas
    print(schemas.json_schema(args.name), end="")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from workbook import diffs
    from workbook.statuses import exit_code
    text, status = diffs.report(args.a, args.b)
    print(text)
    return exit_code([status], strict())


def _import_golden(args: argparse.Namespace) -> int:
    from workbook import bands
    print(f"golden: {bands.import_golden(args.file, args.run, args.platform, args.of)}", file=sys.stderr)
    return 0


def _judge_band(args: argparse.Namespace) -> int:
    from workbook import bands
    found = bands.judge_files(args.golden, args.new, platform=args.platform, low=args.low, high=args.high)
    for band in found:
        print(f"{'PASSED' if band.passed else 'FAILED'}: {band.sentence}")
    return 0 if all(band.passed for band in found) else 1


def _summary(args: argparse.Namespace) -> int:
    from workbook import runner
    return _executing(lambda: runner.summary_only(strict()))


if __name__ == "__main__":
    sys.exit(main())
