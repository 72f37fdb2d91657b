"""Does a run stay small? generate.ipynb over an endpoint with 100,000 requests of 128 streamed tokens, as `make run` takes it.

A scripted server answers, so that what is measured is the notebook: the size of its page, the peak memory of its
kernel (which holds the client and all rows), and its time. The bars: a page under 3 MB, a kernel under 1.5 GB.

    python tests/bench/report_scale.py [--requests 100000] [--tokens 128] [--repetitions 1]
"""
import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "notebooks"), str(TESTS)]
import scripted_server  # noqa: E402
from conftest import command, environment  # noqa: E402

PAGE_MB, KERNEL_GB = 3.0, 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = measured(Path(place), args.requests, args.tokens, args.repetitions)
    print(f"{args.repetitions} x {args.requests:,} requests of {args.tokens} tokens: page {found['page_mb']:.2f} MB, kernel's peak {found['kernel_gb']:.2f} GB, "
          f"{found['seconds']:.0f} s in all, {found['load_s']:.0f} s of it the load; rows {found['rows_mb']:.0f} MB")
    kept = found["page_mb"] < PAGE_MB and found["kernel_gb"] < KERNEL_GB
    print(f"bars: page under {PAGE_MB:g} MB, kernel under {KERNEL_GB:g} GB: {'both kept' if kept else 'MISSED'}")
    sys.exit(not kept)


def measured(place: Path, requests: int, tokens: int, repetitions: int) -> dict[str, float]:
    """Take the exam in folders under `place`; sizes in MB and GB (10^6 and 10^9 bytes), times in seconds."""
    for name in ("params", "goldens"):
        (place / name).mkdir()
    with scripted_server.running(log=False) as server:
        exam = {"run": "scale", "engine": "endpoint", "endpoint": server.url, "subject": "random", "input_len": 16, "output_len": tokens, "max_tokens": 0,
                "chat_template": False, "ignore_eos": True, "num_prompts": requests, "load": "closed", "concurrency": 64, "warmup": 0, "repetitions": repetitions}
        (place / "params" / "scale.yaml").write_text(yaml.safe_dump(exam))
        began = time.monotonic()
        folders = environment(**{f"GOLDBOOK_{name.upper()}": str(place / name) for name in ("params", "goldens", "reports")})
        with subprocess.Popen(command("run", "scale"), env=folders, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
            peak: list[int] = [0]
            watcher = threading.Thread(target=watch, args=(run, peak))
            watcher.start()
            said = run.stderr.read()
        watcher.join()
    folder = place / "reports" / "runs" / "scale"
    if run.returncode:
        raise RuntimeError(said[-2000:])
    from workbook import files
    passes = files.read_json(folder / "run.json")["repetitions"]
    return {"page_mb": (folder / "generate.html").stat().st_size / 1e6, "kernel_gb": peak[0] / 1e9, "seconds": time.monotonic() - began,
            "load_s": sum(p["makespan_s"] for p in passes), "rows_mb": sum(os.path.getsize(p) for p in folder.glob("*.parquet")) / 1e6}


def watch(run: subprocess.Popen, peak: list[int]) -> None:
    """Note the highest resident memory of any kernel below the run: Linux keeps it (`VmHWM`), the last look counts."""
    while run.poll() is None:
        try:
            below = psutil.Process(run.pid).children(recursive=True)
        except psutil.NoSuchProcess:  # it ended since
            break
        for process in below:
            try:
                if "ipykernel_launcher" in " ".join(process.cmdline()):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    peak[0] = max(peak[0], int(status.partition("VmHWM:")[2].split()[0]) << 10)
            except (psutil.Error, OSError, IndexError):
                continue
        time.sleep(0.1)


if __name__ == "__main__":
    main()
