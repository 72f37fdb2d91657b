"""Executing notebooks: what goes wrong is said, and nothing is left running. No engine is needed for that."""
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from workbook import executor, pages

GLUE = "from workbook import scraps\nscraps.glue(done=True)"


def notebook(path, *sources):
    cells = [new_markdown_cell("# Title"), new_markdown_cell("## Section")] + [new_code_cell(s) for s in sources]
    cells[2].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), path)
    return path


def run(tmp_path, *sources, timeout_s=60.0, **given):
    source = notebook(tmp_path / "in.ipynb", "x = 1", *sources)
    return executor.execute(source, tmp_path / "out.ipynb", given, timeout_s=timeout_s, label="test")


def test_a_notebook_that_ends_has_no_problem(tmp_path, capfd):
    done = run(tmp_path, "assert x == 5", GLUE, x=5)
    assert done.problem == "" and 0 < done.cell_seconds < done.seconds
    assert "Section" in capfd.readouterr().err


def test_a_cell_that_announces_is_heard_before_the_next_one_ends(tmp_path, capfd):
    source = notebook(tmp_path / "in.ipynb", "x = 1", "print('a session\\nis taken')", "1 / 0")
    cells = nbformat.read(source, as_version=4)
    cells.cells[3].metadata["tags"] = [executor.ANNOUNCE]
    nbformat.write(cells, source)
    assert executor.execute(source, tmp_path / "out.ipynb", {}, timeout_s=60, label="test").problem
    assert capfd.readouterr().err.rstrip().endswith("s  a session is taken")


def test_a_long_pass_is_heard_of_in_a_log(tmp_path):
    """Which may be a file that the shell opened without appending, as by `> log`: neither overwrites the other's lines."""
    bar = ("from workbook import progress\nprogress.QUIET_S = 0.0\n"
           "with progress.counting(progress.bar('repetition 1/3'), 2) as count:\n    count(type('Answer', (), {'output_tokens': 5}))\n")
    source, script = notebook(tmp_path / "in.ipynb", "x = 1", bar, GLUE), tmp_path / "run.py"
    cells = nbformat.read(source, as_version=4)
    cells.cells.insert(-1, new_markdown_cell("## The end"))
    nbformat.write(cells, source)
    script.write_text(f"from workbook import executor; from pathlib import Path\n"
                      f"print(executor.execute(Path({str(source)!r}), Path({str(tmp_path / 'out.ipynb')!r}), {{}}, timeout_s=60, label='t').problem)")
    from conftest import environment
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run([sys.executable, str(script)], env=environment(), stdout=subprocess.PIPE, stderr=log, text=True, timeout=90)
    lines = (tmp_path / "log").read_text().splitlines()
    assert done.stdout.strip() == "", lines
    heard = [n for n, line in enumerate(lines) if line.startswith("  repetition 1/3: ")]
    assert heard and "Section" in lines[heard[0] - 1] and "The end" in lines[heard[-1] + 1], lines
    assert not any(cell.outputs for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[3:4]), "nothing of it is in the page"


@pytest.mark.parametrize("source, problem", [
    ("from workbook.errors import BadInput\nraise BadInput('key a is 1; expected 2')", "key a is 1; expected 2"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "the notebook's kernel died (killed, out of memory, or a crash in native code)"),
    ("get_ipython().kernel.do_shutdown(False)\nimport os\nos._exit(0)", "the notebook's kernel died (killed, out of memory, or a crash in native code)"),
    ("pass", "the notebook stopped before its last cell without saying why"),
])
def test_each_way_to_fail_has_its_sentence(tmp_path, source, problem):
    assert run(tmp_path, source).problem == problem
    assert (tmp_path / "out.ipynb").exists()


def test_the_limit_is_on_the_whole_notebook(tmp_path):
    done = run(tmp_path, "import time; time.sleep(1.2)", "time.sleep(60)", GLUE, timeout_s=3)
    assert done.problem == "not finished after 3 s, the limit of key 'timeout_s'" and done.seconds < 20


def test_what_a_notebook_started_is_ended(tmp_path):
    """Even a process that left the kernel's session, whose parent is dead, and that ignores SIGTERM."""
    script = tmp_path / "run.py"
    orphan = ("import subprocess, sys\n"
              "child = \"import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)\"\n"
              "middle = f'import subprocess, sys, os; p = subprocess.Popen([sys.executable, \"-c\", {child!r}], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL); p.stdout.readline(); print(p.pid, flush=True); os._exit(0)'\n"
              "pid = int(subprocess.run([sys.executable, '-c', middle], capture_output=True, text=True).stdout)\n"
              f"open({str(tmp_path / 'pid')!r}, 'w').write(str(pid))")
    source = notebook(tmp_path / "in.ipynb", "x = 1", orphan, GLUE)
    script.write_text(f"from workbook import executor; from pathlib import Path\nexecutor.adopt_orphans()\n"
                      f"print(executor.execute(Path({str(source)!r}), Path({str(tmp_path / 'out.ipynb')!r}), {{}}, timeout_s=60, label='t').problem)")
    from conftest import environment
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True, timeout=90)
    assert done.stdout.strip() == "", done.stderr
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("plain", [False, True], ids=["our runner", "plain papermill"])
def test_what_a_notebook_started_does_not_outlive_a_runner_that_is_killed(tmp_path, plain):
    """Though the kernel leaves without a word to what it started, as vLLM's engine core is, and that ignores SIGTERM and SIGINT.
    Under plain papermill it is the start of an engine that sees to it; here an endpoint where nobody is."""
    child = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT)]; print('up', flush=True); time.sleep(600)"
    start = (f"import os, subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\nchild.stdout.readline()\n"
             f"open({str(tmp_path / 'scratch')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\nos.rename({str(tmp_path / 'scratch')!r}, {str(tmp_path / 'pids')!r})\ntime.sleep(600)")
    endpoint = ("from pathlib import Path\nfrom workbook import engines, params\nfrom workbook.errors import BadInput\n"
                "exam = params.check({'run': 'x', 'engine': 'endpoint', 'endpoint': 'http://127.0.0.1:9'})\n"
                "try:\n    engines.start(exam, Path(), Path())\nexcept BadInput:\n    pass")
    source, script = notebook(tmp_path / "in.ipynb", "x = 1", *[endpoint] * plain, start), tmp_path / "run.py"
    script.write_text(f"import papermill\npapermill.execute_notebook({str(source)!r}, {str(tmp_path / 'out.ipynb')!r}, progress_bar=False)" if plain else
                      f"from workbook import executor; from pathlib import Path\nexecutor.adopt_orphans()\n"
                      f"executor.execute(Path({str(source)!r}), Path({str(tmp_path / 'out.ipynb')!r}), {{}}, timeout_s=60, label='t')")
    from conftest import environment
    with subprocess.Popen([sys.executable, str(script)], env=environment(), stderr=subprocess.DEVNULL) as job:
        while not (tmp_path / "pids").exists():
            assert job.poll() is None
            time.sleep(0.05)
        kernel, own = (psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split())
        three = [kernel, *kernel.children()]
        assert own in three and len(three) == 3, "the kernel, what it started, and the shell that waits"
        job.kill()
    deadline = time.monotonic() + 20
    while (left := [p for p in three if runs(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()
    assert left == []


@pytest.mark.parametrize("attempt", range(3))
def test_a_kernel_that_ends_in_order_does_so_to_the_last_line(tmp_path, attempt):
    """At its `atexit` a server is stopped; the shell that waits for a kernel's end once kept three of five from it."""
    done = run(tmp_path, f"import atexit\natexit.register(lambda: open({str(tmp_path / 'end')!r}, 'w').close())", GLUE)
    assert done.problem == "" and (tmp_path / "end").exists()


def runs(process):
    """Whether it does; what has ended may be a zombie where init does not reap."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_sigterm_is_an_interruption():
    with pytest.raises(KeyboardInterrupt), executor.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_an_interruption_has_the_last_word(tmp_path):
    """Though it arrives in the task that takes in the cell's output, here without a pause, and asyncio would print what that task ends with
    (in about every second trial)."""
    slow = "import time\ntry:\n    open('started', 'w').close()\n    while True:\n        print('.', flush=True)\nexcept KeyboardInterrupt:\n    raise RuntimeError('cut off')"
    source, script = notebook(tmp_path / "in.ipynb", "x = 1", f"import os\nos.chdir({str(tmp_path)!r})", slow), tmp_path / "script.py"
    script.write_text(f"from workbook import executor; from pathlib import Path\ntry:\n    with executor.interruptible():\n"
                      f"        executor.execute(Path({str(source)!r}), Path({str(tmp_path / 'out.ipynb')!r}), {{}}, timeout_s=60, label='t')\n"
                      f"except KeyboardInterrupt:\n    executor.end_processes()\nprint('goldbook: interrupted')")
    from conftest import environment
    with subprocess.Popen([sys.executable, str(script)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        while not (tmp_path / "started").exists():
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.05)
        job.terminate()
        said, stack = job.communicate(timeout=60)
    assert said == "goldbook: interrupted\n" and "Traceback" not in stack and "cell" in stack, stack


def test_a_terminal_without_a_path_is_none(monkeypatch):
    """As in a container that was entered from outside; not knowing it must not end a run."""
    def nameless(number):
        raise OSError(19, "No such device")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(executor.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(executor.os, "ttyname", nameless)
    assert executor._terminal() == ""


# -- pages --------------------------------------------------------------------------------------


def page(tmp_path, cells, log=None, problem=None, **options):
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    if problem:
        pages.add_failure(path, problem, log)
    pages.write(path, tmp_path / "a.html", "a title", [("summary", "../index.html"), ("a", "")], **options)
    return (tmp_path / "a.html").read_text()


def test_a_page_is_complete_and_fetches_nothing(tmp_path):
    import re
    html = page(tmp_path, [new_markdown_cell("# T\n\n$x^2$"), new_code_cell("1")])
    assert "<title>a title</title>" in html and '<a href="../index.html">summary</a>' in html
    fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?!data:)([^\"'> ]+)|@import|url\((?![\"']?data:|#)([^)]*)\)|import\(", html)
    assert fetched == []


def test_a_page_leads_to_what_was_made_after_it(tmp_path):
    before = page(tmp_path, [new_markdown_cell("# T\n\n<nav>another</nav>")])
    for _ in range(2):
        pages.link(tmp_path / "a.html", "b", "b.html")
    added = '<b>a</b><a href="b.html">b</a></nav>'
    assert (tmp_path / "a.html").read_text() == before.replace("<b>a</b></nav>", added)


def test_the_headline_comes_first_and_scraps_are_dropped(tmp_path):
    last = new_code_cell("code_of_headline", metadata={"tags": ["headline", "hide-input"]},
                         outputs=[nbformat.v4.new_output("display_data", {"text/html": "<b>VERDICT</b>"}),
                                  nbformat.v4.new_output("display_data", {"application/scrapbook.scrap.json+json": {"name": "a"}})])
    html = page(tmp_path, [new_markdown_cell("# Title"), new_markdown_cell("## Details"), last])
    assert html.index("VERDICT") < html.index("Details") and "code_of_headline" not in html and "scrapbook" not in html


def test_a_failure_is_at_the_top_with_the_end_of_the_log(tmp_path):
    log = tmp_path / "engine.log"
    log.write_text("\n".join(f"line {i} <b>" for i in range(500)) + "\n\nlast")
    html = page(tmp_path, [new_markdown_cell("# Title")], log, "the engine <died>")
    assert html.index("This run failed.") < html.index("Title</h1>")
    assert "the engine &lt;died&gt;" in html and "line 499 &lt;b&gt;" in html and "line 100 " not in html


def test_a_failure_is_said_once(tmp_path):
    """In the words of whoever knows the most of it, and not by papermill too, whose link leads nowhere on a page; where it happened stays marked."""
    done, path = run(tmp_path, "1 / 0"), tmp_path / "out.ipynb"
    for sentence in (done.problem, f"out.ipynb failed: {done.problem}, while recording"):
        pages.add_failure(path, sentence, tmp_path / "none.log")
    pages.write(path, tmp_path / "out.html", "out", [])
    html = (tmp_path / "out.html").read_text()
    assert html.count("This run failed.") == 1 and "ZeroDivisionError: division by zero, while recording" in html
    assert "An Exception was encountered" not in html and html.count("encountered an exception here") == 1


def test_code_can_be_left_out(tmp_path):
    assert "secret_code" not in page(tmp_path, [new_markdown_cell("# T"), new_code_cell("secret_code")], code=False)
