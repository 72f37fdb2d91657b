"""Checkpoints with a fault, made of a good one: what the checks of quality have to catch."""
import json
import shutil
import struct
from pathlib import Path

import numpy as np

SPREAD = 0.02
"""Standard deviation of the random weights, as transformers initialises them (`initializer_range`)."""


def random_weights(source: Path, folder: Path, seed: int = 0) -> Path:
    """A copy of a model folder whose bf16 weights are random: normal, the norms 1. Shapes, names and tokenizer stay."""
    shutil.copytree(source, folder)
    rng = np.random.default_rng(seed)
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            for name, tensor in json.loads(stream.read(size)).items():
                if name != "__metadata__":
                    assert tensor["dtype"] == "BF16", (name, tensor["dtype"])
                    count = int(np.prod(tensor["shape"]))
                    values = np.ones(count, np.float32) if len(tensor["shape"]) == 1 else SPREAD * rng.standard_normal(count, np.float32)
                    stream.seek(8 + size + tensor["data_offsets"][0])
                    stream.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())  # bf16 is the upper half of a float
    return folder
