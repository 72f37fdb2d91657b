"""Ports of servers that start side by side: `workbook.engines.ports`."""
import socket

import pytest

from workbook.engines import ports
from workbook.errors import BadInput


def given_out(tmp_path, monkeypatch, text):
    file = tmp_path / "range"
    file.write_text(text)
    monkeypatch.setattr(ports, "GIVEN_OUT", file)


def close(blocks):
    for block in blocks:
        block.close()


def test_blocks_are_apart_and_outside_what_the_kernel_gives_out(tmp_path, monkeypatch):
    low, high = 32_768, 60_999
    given_out(tmp_path, monkeypatch, f"{low} {high}")
    first, others = ports.take(3), ports.take(13)
    numbers = sorted(b.api for b in first + others)
    assert all(after - before >= ports.BLOCK for before, after in zip(numbers, numbers[1:], strict=False)), "whoever else takes blocks has others"
    assert not any(low <= port <= high for b in first + others for port in range(b.api - 1, b.api - 1 + ports.BLOCK))
    assert all(b.engines == b.api + 1 for b in first)
    close(first)
    again = ports.take(3)
    assert [b.api for b in again] == [b.api for b in first], "closed, they can be taken again"
    close(again + others)


def test_a_server_listens_on_its_port_while_its_block_is_held():
    (block,) = ports.take(1)
    with socket.create_server(("127.0.0.1", block.api)), socket.create_server(("", block.engines)):
        (other,) = ports.take(1)
        assert other.api > block.api
        close([block])
        (third,) = ports.take(1)
        assert third.api > block.api, "where a server listens still, its block is not free"
        close([other, third])


@pytest.mark.parametrize("text, low, high", [("1024 32767", 32_768, 65_536), ("1024 65535", ports.FIRST, 65_536), ("40000 50000", ports.FIRST, 40_000), ("", ports.FIRST, 32_768)])
def test_where_there_is_room(tmp_path, monkeypatch, text, low, high):
    given_out(tmp_path, monkeypatch, text)
    begins = ports._starts()
    assert low <= begins[0] and begins[-1] + ports.BLOCK <= high and len(begins) >= 64


def test_no_room_is_one_sentence_and_what_was_taken_is_given_back(monkeypatch):
    monkeypatch.setattr(ports, "_starts", lambda: range(20_000, 20_000 + 3 * ports.BLOCK, ports.BLOCK))
    blocks = ports.take(2)
    with pytest.raises(BadInput, match="^2 servers need 32 ports each and 1 of these blocks are free from 16384 on; expected servers of other programs to listen elsewhere$"):
        ports.take(2)
    (third,) = ports.take(1)
    assert third.api == 20_000 + 2 * ports.BLOCK + 1
    close([*blocks, third])
