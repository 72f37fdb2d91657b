"""The CPU cores of this process among those that the kernel keeps counts of."""
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
STAT = Path("/proc/stat")


def own(values: Sequence[T]) -> list[T]:
    """Of psutil's values by core those of the cores that this process may use.

    They are in the order of /proc/stat, which leaves out cores that are offline; a container may have another
    numbering there (lxcfs counts its own from 0), and then all that it shows are ours.
    """
    allowed = os.sched_getaffinity(0)
    numbers = [int(number) for number in re.findall(r"^cpu(\d+) ", STAT.read_text(), re.MULTILINE)]
    found = [value for number, value in zip(numbers, values, strict=False) if number in allowed]
    return found if len(found) == len(allowed) else list(values)
