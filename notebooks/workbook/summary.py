"""The summary over all runs: what `summary.ipynb` shows, and the files that machines read."""
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from workbook import exams, files, metrics, paths, progress, runs, schemas
from workbook.errors import BadInput
from workbook.runs import STAGES
from workbook.statuses import EXIT_CODES, IN_DOUBT, STRICT_EXIT_CODES, overall, strict

NOT_TAKEN = ("SKIPPED", "NOT_RUN")
NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML document may hold (XML 1.0, 2.2): the colours of an engine's last words, say."""


def collect() -> list[dict[str, Any]]:
    """The result of every run: those with a params file and those with a folder in the reports, by name.

    A run without a result is listed as NOT_RUN, as is in JupyterLab one that is being made, and one that was killed, or whose result cannot be
    read, as INVALID: nothing is left out.
    """
    folders = {p.name for p in (paths.reports() / "runs").glob("*") if p.is_dir()}
    return [_result(run) for run in sorted(folders | set(exams.names()))]


def _result(run: str) -> dict[str, Any]:
    path = paths.run_folder(run) / "result.json"
    if not path.exists() and (path.parent / "params.yaml").exists():  # which the runner writes first
        if progress.TERMINAL not in os.environ and (who := runs.under_way(run)):  # the runner's own summary comes after its runs
            return schemas.stopped(run, "NOT_RUN", f"is being run ({who})")
        return schemas.stopped(run, "INVALID", "was started and has no result: it was killed, or the machine went down")
    if not path.exists():
        return schemas.stopped(run, "NOT_RUN", "has not been run on this machine")
    try:
        return schemas.read_result(path)
    except BadInput as error:
        return schemas.stopped(run, "INVALID", str(error))


def throughput(result: dict[str, Any]) -> dict[str, Any]:
    """What a result has of its run's output tok/s (at the largest point of a sweep); empty if it was not measured."""
    return result["metrics"].get(metrics.headline(result["metrics"]), {})


def left_out(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The runs that were not taken, those with the same reason together: how many, status, why, which."""
    names: dict[tuple[str, str], list[str]] = {}
    for r in found:
        if r["status"] in NOT_TAKEN:
            names.setdefault((r["status"], r["sentence"]), []).append(r["run"])
    return [{"runs": str(len(runs)), "status": status.replace("_", " "), "why": why, "which": _by_exam(runs)} for (status, why), runs in names.items()]


def _by_exam(names: list[str]) -> str:
    """Names of runs, an exam's variants behind it: there are more of them than anybody reads one by one."""
    variants: dict[str, list[str]] = {}
    for name in names:
        exam, at, variant = name.partition("@")
        variants.setdefault(exam, []).append(at + variant)
    return "; ".join(" ".join(filter(None, [exam, *found])) for exam, found in variants.items())


def links(run: str, place: Path) -> dict[str, str]:
    """Addresses of the pages a run has, from the folder of what has the links."""
    pages = {stage: paths.run_folder(run) / f"{stage}.html" for stage in STAGES}
    return {stage: Path(os.path.relpath(page, place)).as_posix() for stage, page in pages.items() if page.exists()}


def shown_in() -> Path:
    """The folder from which what this notebook shows is clicked: the runner makes a page of it in `reports/`, and JupyterLab shows the
    notebook itself."""
    return paths.reports() if progress.TERMINAL in os.environ else paths.NOTEBOOKS


def history() -> list[dict[str, Any]]:
    """Earlier results of the runs, the latest first; that one could not be taken on this machine is none."""
    rows = []
    for path in sorted((paths.reports() / "history").glob("*/*/result.json"), key=lambda p: p.parent.name, reverse=True):
        try:
            result = schemas.read_result(path)
        except BadInput as error:
            result = schemas.stopped(path.parent.parent.name, "INVALID", str(error))
        if result["status"] == "SKIPPED":
            continue
        rows.append({"run": result["run"], "finished": result.get("finished") or "–", "status": result["status"],
                     "output tok/s": throughput(result).get("median"), "kept in": str(path.parent.relative_to(paths.reports()))})
    return rows


def chains(found: list[dict[str, Any]]) -> list[tuple[str, str, str, list[tuple[str, float]], float | None]]:
    """The chains of goldens that were blessed more than once, one for each gated metric of a run.

    Returns:
        Run, metric, unit, (time, mean) of each blessing, and the median of the run's own samples.
    """
    rows = []
    for result in found:
        history = (result.get("golden") or {}).get("history", [])
        for name, metric in result["metrics"].items():
            points = [(link["when"], link["means"][name]) for link in history if name in link["means"]]
            if len(points) > 1:
                rows.append((result["run"], name, metric["unit"], points, metric["median"]))
    return rows


def statuses(found: list[dict[str, Any]]) -> list[str]:
    """The statuses that count towards the whole: those of runs that were started or skipped."""
    return [r["status"] for r in found if r["status"] != "NOT_RUN"]


def whole(found: list[dict[str, Any]]) -> str:
    """The status of all runs together; NOT_RUN where none was started or skipped."""
    return overall(statuses(found)) if statuses(found) else "NOT_RUN"


def write(found: list[dict[str, Any]], folder: Path) -> None:
    """Write summary.json, summary.md and junit.xml."""
    files.write_json(folder / "summary.json", {"schema_version": 1, "status": whole(found), "runs": found})
    files.write_text(folder / "summary.md", markdown(found))
    files.write_text(folder / "junit.xml", junit(found, strict()))


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for a CI job's page, and below it in full what is REGRESSED or INCONCLUSIVE."""
    lines = [f"## Goldbook: {whole(found)}", "", "| run | status | output tok/s | golden | why |", "| --- | --- | ---: | ---: | --- |"]
    for r in (r for r in found if r["status"] not in NOT_TAKEN):
        speed = throughput(r)
        numbers = [f"{speed[k]:,.0f}" if speed.get(k) else "–" for k in ("median", "golden_median")]
        lines.append(f"| {r['run']} | **{r['status']}** | {numbers[0]} | {numbers[1]} | {_cell(schemas.brief(r))} |")
    lines += ["", *(f"- {r['run']}: {_cell(r['sentence'])}" for r in found if r["status"] in IN_DOUBT and r["sentence"] != schemas.brief(r))]
    lines += [*(f"- {left['status']}, {_cell(left['why'])}: {left['runs']} ({left['which']})" for left in left_out(found))]
    return "\n".join(lines).rstrip() + "\n"


def junit(found: list[dict[str, Any]], strictly: bool = False) -> str:
    """One test case a run, its message the sentence in brief and its text the whole: REGRESSED is a failure, INVALID an error, SKIPPED, NOT_RUN and NO_GOLDEN are skipped; strictly: what has an
    exit code under STRICT=1 alone (NO_GOLDEN, INCONCLUSIVE) is a failure too."""
    kinds = {"REGRESSED": "failure", "INVALID": "error", "SKIPPED": "skipped", "NOT_RUN": "skipped", "NO_GOLDEN": "skipped"}
    kinds |= dict.fromkeys(STRICT_EXIT_CODES.keys() - EXIT_CODES.keys(), "failure") if strictly else {}
    count = Counter(kinds.get(r["status"]) for r in found)
    suite = ElementTree.Element("testsuite", name="goldbook", tests=str(len(found)), failures=str(count["failure"]), errors=str(count["error"]), skipped=str(count["skipped"]))
    for r in found:
        case = ElementTree.SubElement(suite, "testcase", classname="goldbook", name=r["run"], time=f"{r.get('seconds', 0):.1f}")
        brief, whole_sentence = (NOT_XML.sub("", f"{r['status']}: {said}") for said in (schemas.brief(r), r["sentence"]))
        if kind := kinds.get(r["status"]):
            ElementTree.SubElement(case, kind, message=brief).text = whole_sentence
        else:
            ElementTree.SubElement(case, "system-out").text = whole_sentence
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
