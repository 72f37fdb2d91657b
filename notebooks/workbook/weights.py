"""The hash that names a model's weights."""
import hashlib
import json
import struct
from pathlib import Path

from workbook.errors import BadInput


def sha256(folder: Path) -> str:
    """SHA-256 over all tensors of a folder's safetensors files: name, type, shape and bytes, by name.

    The same tensors give the same hash however they are split over files and whatever wrote them.

    Raises:
        BadInput: a file is none of safetensors, or is cut off.
    """
    entries = {}
    for path in sorted(folder.glob("*.safetensors")):
        size, header = _header(path)
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


def check(folder: Path) -> None:
    """Raise BadInput where a safetensors file of a folder has no header: cut off, or the pointer of Git LFS in its place."""
    for path in folder.glob("*.safetensors"):
        _header(path)


def _header(path: Path) -> tuple[int, dict]:
    """Bytes of a safetensors file's header, and what it says of each tensor."""
    length = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        size = struct.unpack("<Q", first)[0] if len(first) == 8 else length
        if size > length - 8:
            pointer = ", but the pointer of Git LFS to one (git lfs pull fetches it)" if first == b"version " else f" in its {length:,} bytes"
            raise BadInput(f"{path}: has no header of safetensors{pointer}; expected a complete safetensors file")
        try:
            return size, json.loads(stream.read(size))
        except ValueError as error:
            raise BadInput(f"{path}: the header is not JSON ({error}); expected a complete safetensors file") from None
