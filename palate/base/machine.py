"""The machine at hand: which process this is, and which versions it runs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from importlib import metadata

from palate.base.errors import UserError, first_line, short


def versions() -> dict[str, str]:
    """What produced a result: Python, Palate and the libraries that decide numbers."""
    names = ("palate", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def is_main() -> bool:
    """Whether this is the process that writes and speaks, of those that ``accelerate launch`` may have started."""
    return int(os.environ.get("RANK", "0")) == 0


def device() -> str:
    """Where this process computes: its own GPU, of those that ``accelerate launch`` shares out, or the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def found_device(name: str | None) -> str:
    """A device by the name that a user gave it, or :func:`device` without one. Raises UserError: there is none of this name."""
    import torch

    if name is None:
        return device()
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"device is {short(name)}; expected cpu, cuda, or cuda:1 for the second GPU")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name} here ({first_line(error)}): use cpu, or leave it out") from error
    return name


def tell(text: str) -> None:
    if is_main():
        print(text, file=sys.stderr, flush=True)


def processes() -> int:
    """How many processes ``accelerate launch`` has started; known before accelerate is loaded."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def part_of(text: str) -> tuple[int, int]:
    """Index, from 0, and count of a share of some work as a command names it: ``1/4`` to ``4/4``.

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        n = max(1, int(found[2])) if found else 4
        raise UserError(
            f"shard is {short(text)}; expected its number, counted from 1, and how many there are: 1/{n} to {n}/{n}"
        )
    return int(found[1]) - 1, int(found[2])


def device_memory() -> float:
    """Bytes of memory of the device at hand, free or not."""
    import torch

    if (where := device()) != "cpu":
        return float(torch.cuda.mem_get_info(where)[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def resident() -> float:
    """Bytes that the process takes of main memory now, where it computes there; 0 beside a GPU."""
    import torch

    if torch.cuda.is_available():
        return 0.0
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return 0.0


class Peak:
    """The most memory that was taken since this was made: of the GPU by tensors, else by the whole process.

    Of a process only Linux tells it from now on; elsewhere it is what the process takes.
    """

    def __init__(self) -> None:
        import torch

        self._gpu = torch.cuda.is_available()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the kernel counts the highest anew

    def bytes(self) -> float:
        import torch

        if self._gpu:
            return float(torch.cuda.max_memory_allocated())
        with contextlib.suppress(OSError), open("/proc/self/status") as file:
            return 1024.0 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        import resource

        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
