"""A vLLM plugin whose engine does other than it is asked: the faults of a sampler or a scheduler, which no parameter shows.

`FAULTY_ENGINE` holds what it samples with instead, such as {"temperature": 5.0}, and `slower`, the share of each step's time that
it sleeps after it. Reads (`prompt_logprobs`, one token) are left as they are.
"""
import functools
import json
import os
import time
from pathlib import Path

FAULTS = json.loads(os.environ.get("FAULTY_ENGINE", "{}"))
SLOWER = FAULTS.pop("slower", 0.0)


def load() -> None:
    """What vLLM calls in every process of its own: change each request as it reaches the engine core."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request
    if hasattr(Request.__init__, "__wrapped__"):
        return

    @functools.wraps(Request.__init__)
    def faulty(self, request_id, prompt_token_ids, sampling_params, *args, original=Request.__init__, **more):
        if sampling_params is not None and sampling_params.max_tokens > 1:
            for name, value in FAULTS.items():
                setattr(sampling_params, name, value)
        original(self, request_id, prompt_token_ids, sampling_params, *args, **more)
    Request.__init__ = faulty
    if SLOWER:
        EngineCore.step, EngineCore.step_with_batch_queue = map(_slowed, (EngineCore.step, EngineCore.step_with_batch_queue))


def _slowed(step):
    @functools.wraps(step)
    def slowed(self):
        began = time.monotonic()
        done = step(self)
        time.sleep(SLOWER * (time.monotonic() - began))
        return done
    return slowed


def installed(folder: Path, **faults) -> dict[str, str]:
    """Environment in which every vLLM has the faults; `folder` gets the files by which it finds the plugin."""
    about = folder / "faulty_engine-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-engine\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nfaulty_engine = faulty_engine:load\n")
    return {"FAULTY_ENGINE": json.dumps(faults), "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)])}
