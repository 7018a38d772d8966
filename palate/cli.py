"""The command line: its verbs, and how their errors are told."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from palate.base.errors import UserError, broken, nearest, short
from palate.verbs.table import GROUPS, VERBS

LONGEST = 600
"""Of an error, in letters: nothing that others wrote is printed whole."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; 0 on success, 2 on a mistake of the user, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # The libraries read these as they are imported: from here on their advice to programmers is not shown.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # its errors are raised as well, and told by us
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:  # where no better place has told what to lower
        if not _out_of_memory(error):
            raise
        print(
            "error: no free memory: lower the batch size (train_batch_size, sample_batch_size, evaluation_batch_size or "
            "batch_size, whichever was at work) or the resolution, or end what else uses the device",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # palate train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 0
    except OSError as error:
        import errno

        full = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
        # Of a place that a user named; without a name it is a mistake of ours, which keeps its traceback.
        elsewhere = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
        if error.errno not in full and not (error.errno in elsewhere and isinstance(error.filename, str)):
            raise
        what = "cannot be written" if error.errno in full else "cannot be read or written"
        where = short(str(error.filename or "the output folder"), 160, quoted=False)
        told = f"error: {where} {what}: {error.strerror}; free some space or name another folder"
        print(_one_line(told), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        step = getattr(stop, "step", None)  # of the loop, which has saved a checkpoint
        how = f"after step {step}; the same command with --resume_from_checkpoint latest goes on" if step else str(stop)
        print(f"stopped: {how or 'the same command begins again, what was encoded is kept'}", file=sys.stderr)
        return 130


def _one_line(message: str) -> str:
    """A message as a terminal shows it: on one line, without control characters, and cut in its middle beyond all measure."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST * 3 // 10 :]}"


def _out_of_memory(error: Exception) -> bool:
    """Whether it is Python's, PyTorch's on a GPU, or that of its allocator on a CPU; torch need not be loaded to tell."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or ("DefaultCPUAllocator" in str(error) and "memory" in str(error))


def _dispatch(words: list[str]) -> int:
    if odd := [word for word in words if broken(word)]:
        raise UserError(f"{short(odd[0])} is not in UTF-8, in which names and texts are written: rename the file or folder")
    if words[1:] and words[0] in ("-h", "--help", "help") and words[1] in VERBS:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("--version", "-V", "version"):
        from palate.base.machine import versions

        print(versions()["palate"])
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise UserError(f"no command {short(verb)}{nearest(verb, VERBS)}")
    return importlib.import_module(f"palate.verbs.{verb.replace('-', '_')}").main(rest)


def _help() -> str:
    width = max(map(len, VERBS))
    lines = []
    for heading, group in GROUPS.items():
        lines += [heading, *(f"  {verb.ljust(width)}  {text}" for verb, text in group.items()), ""]
    return "\n".join(
        [
            "palate: align text-to-image diffusion models with taste",
            "",
            *lines,
            "A first run, on the embedded miniature world: palate train miniature-dpo --output_dir out/first",
            "'palate VERB --help' lists the options of a verb, 'palate --version' tells the version.",
        ]
    )
