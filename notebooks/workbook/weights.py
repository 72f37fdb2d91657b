"""The hash that names a model's weights."""
import hashlib
import json
import struct
from pathlib import Path

from workbook.errors import BadInput


def sha256(folder: Path) -> str:
    """SHA-256 over all tensors of a folder's safetensors files: name, type, shape and bytes, by name.

    The same tensors give the same hash however they are split over files and whatever wrote them.
    """
    entries = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        for name, tensor in header.items():
            if name != "__metadata__":
                entries[name] = (path, 8 + size, tensor)
    total = hashlib.sha256()
    for name, (path, base, tensor) in sorted(entries.items()):
        total.update(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
        begin, end = tensor["data_offsets"]
        with path.open("rb") as stream:
            stream.seek(base + begin)
            left = end - begin
            while left:
                block = stream.read(min(left, 1 << 22))
                if not block:
                    raise BadInput(f"{path}: ends before tensor '{name}' does; expected a complete safetensors file")
                total.update(block)
                left -= len(block)
    return total.hexdigest()
