"""Ports for servers that start side by side, and that nobody else is given between their choice and their use.

A vLLM engine on a GPU asks the kernel for a free port, lets go of it, and listens there a second or two later. In between the kernel may
give it to whoever asks for any port, as the engines beside it do: of seven starts of eight engines two ended so. A port outside the
range that the kernel gives out of goes to nobody who has not named it.
"""
import contextlib
import dataclasses
import socket
from pathlib import Path

from workbook.errors import BadInput

GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST = 16_384
"""Below it the ports of well-known services are."""
BLOCK = 32
"""Ports of one server. It uses two or three: where it answers, and where an engine's workers meet; vLLM looks for one upwards."""


@dataclasses.dataclass
class Block:
    """A server's ports; nobody who takes blocks is given them too until `close`.

    Attributes:
        api: where it answers.
        engines: from where on its engines look for a free one (vLLM's `VLLM_PORT`).
    """

    api: int
    engines: int
    _held: socket.socket

    def close(self) -> None:
        """Leave them to others; its servers may listen still."""
        self._held.close()


def take(count: int) -> list[Block]:
    """A block for each of so many servers.

    Raises:
        BadInput: there are not as many that are free.
    """
    with contextlib.ExitStack() as undo:
        blocks: list[Block] = []
        for first in _starts():
            if len(blocks) == count:
                break
            held = undo.enter_context(socket.socket())
            try:
                held.bind(("127.0.0.1", first))  # bound and never listening: that alone keeps others off
                _try(first + 1)
            except OSError:
                held.close()
                continue
            blocks.append(Block(first + 1, first + 2, held))
        if len(blocks) < count:
            raise BadInput(f"{count} servers need {BLOCK} ports each and {len(blocks)} of these blocks are free from {FIRST} on; expected servers of other programs to listen elsewhere")
        undo.pop_all()
        return blocks


def _starts() -> range:
    """Where blocks begin: below the range that the kernel gives out of, or above it, or inside where it leaves no room."""
    try:
        low, high = map(int, GIVEN_OUT.read_text().split())
    except (OSError, ValueError):
        low, high = 32_768, 60_999  # Linux's own
    for begin, end in (FIRST, low), (high + 1, 65_536):
        if end - begin >= 64 * BLOCK:
            return range(begin, end - BLOCK + 1, BLOCK)
    return range(FIRST, 65_536 - BLOCK + 1, BLOCK)


def _try(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does: connections that have just ended do not count
        probe.bind(("127.0.0.1", port))
