"""Does the client stay small? 1,000, 10,000 and 100,000 requests of 128 tokens, all replies kept.

Each size in a process of its own, closed loop, with its peak memory, time and CPU time. The scripted server
sends the 128 events of an answer one by one in as few writes as it can, so that the time is the two programs' own.

    python tests/bench/client_scale.py [--sizes 1000 10000 100000] [--rounds 1]
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "notebooks"), str(TESTS)]
import scripted_server  # noqa: E402

CONCURRENCY, TOKENS = 64, 128
PEAK_MB, GROWTH = 1500, 1.2
"""The bars, for every size: peak memory, and time per request against the first size's."""


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return drive(args.child[0], int(args.child[1]))
    found: dict[int, list[dict]] = {n: [] for n in args.sizes}
    with scripted_server.running(log=False) as server:
        for _ in range(args.rounds):
            for n in args.sizes:
                said = subprocess.run([sys.executable, __file__, "--child", server.url, str(n)], check=True, capture_output=True, text=True).stdout
                found[n].append(json.loads(said))
                print(f"{n} requests: {said.strip()}", flush=True)
    print(f"\n{'requests':>9} {'time s':>8} {'ms/request':>11} {'CPU ms/request':>15} {'peak MB':>8} {'kB/request':>11}   of the first's time per request")
    base, missed = found[args.sizes[0]], []
    for n, rows in found.items():
        middle = {key: float(np.median([row[key] for row in rows])) for key in rows[0]}
        ratio = middle["ms"] / np.median([row["ms"] for row in base])
        print(f"{n:9,} {middle['seconds']:8.2f} {middle['ms']:11.3f} {middle['cpu_ms']:15.3f} {middle['peak_mb']:8.0f} "
              f"{(middle['peak_mb'] - middle['base_mb']) * 1e3 / n:11.2f}   {ratio:.3f}")
        missed += [f"{n:,}"] if middle["peak_mb"] >= PEAK_MB or ratio > GROWTH else []
    print(f"bars: peak under {PEAK_MB:,} MB, time per request at most {GROWTH:g} times the first's: {'missed at ' + ', '.join(missed) if missed else 'kept'}")
    return int(bool(missed))


def drive(url: str, n: int) -> None:
    """n requests in this process, as JSON on standard output."""
    from workbook import arrivals
    from workbook.client import Client, Request

    async def load(count: int):
        client = Client(url)
        requests = (Request(list(range(100, 164)), TOKENS, "scripted", seed=1) for i in range(count))
        done = await arrivals.closed_loop(client.complete, requests, CONCURRENCY)
        await client.close()
        return done
    arrivals.run(load(200))  # imports, connections, the server's cache of events
    base, cpu, began = peak_mb(), time.process_time(), time.monotonic()
    done = arrivals.run(load(n))
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    assert len(done.replies) == n and all(len(r.chunk_times) == TOKENS and r.output_tokens == TOKENS and not r.error for r in done.replies)
    print(json.dumps({"seconds": seconds, "ms": seconds / n * 1e3, "cpu_ms": cpu / n * 1e3, "peak_mb": peak_mb(), "base_mb": base}))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    sys.exit(main())
