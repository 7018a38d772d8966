"""The command line: verbs, each a few lines over a library call."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.errors import UserError, nearest

VERBS = {
    "train": "align a model: palate train RECIPE [--option value ...]",
    "evaluate": "compare base and tuned model of a finished run again: palate evaluate RUN [--option value ...]",
    "recipes": "list recipes, show one, or copy one to edit: palate recipes [show NAME | copy NAME [FILE]]",
    "miniature": "rebuild the embedded miniature world: palate miniature build [--work_dir DIR]",
}


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
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # palate train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 0
    except OSError as error:
        import errno

        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = error.filename or "the output folder"
        print(f"error: {where} cannot be written: {error.strerror}; free some space or name another folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        step = getattr(stop, "step", None)  # of the loop, which has saved a checkpoint
        how = f"after step {step}; the same command with --resume_from_checkpoint latest goes on" if step else str(stop)
        print(f"stopped: {how or 'the same command begins again, what was encoded is kept'}", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from palate.run import versions

        print(versions()["palate"])
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise UserError(f"no command {verb!r}{nearest(verb, VERBS)}")
    return {"train": _train, "evaluate": _evaluate, "recipes": _recipes, "miniature": _miniature}[verb](rest)


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb.ljust(width)}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "palate: align text-to-image diffusion models with taste",
            "",
            *lines,
            "",
            "A first run on the embedded miniature world: palate train miniature-dpo --output_dir out",
            "'palate train --help' lists the options of a recipe.",
        ]
    )


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """``--name value`` and ``--name=value`` to a dictionary; values stay text, but for lists and mappings in YAML."""
    from palate.recipe import parse

    found: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"{word!r} is not an option; expected --name value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"--{name} lacks a value; switches are written --{name} true")
            text = queue.pop(0)
        found[name] = parse(text, f"--{name}") if text[:1] in ("[", "{") else text
    return found


def _train(words: list[str]) -> int:
    if not words or "-h" in words or "--help" in words:
        from palate.recipe import options_help

        print(options_help())
        return 0
    if words[0].startswith("--"):
        raise UserError("palate train expects a recipe first, such as: palate train miniature-dpo --output_dir out")
    from palate import recipe

    made = recipe.load(words[0], overrides(words[1:]))
    from palate import run

    run.train(made, command=shlex.join(["palate", "train", *words]))
    return 0


def _evaluate(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        raise UserError("palate evaluate expects the folder of a finished run")
    from palate import recipe, run

    folder = Path(words[0])
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no recipe.yaml; expected the output folder of palate train")
    made = recipe.load(str(folder / "recipe.yaml"), {**overrides(words[1:]), "output_dir": str(folder)})
    run.evaluate(made, command=shlex.join(["palate", "evaluate", *words]))
    return 0


def _recipes(words: list[str]) -> int:
    from palate import recipe

    if not words or words == ["list"]:
        for name, path in recipe.built_in().items():
            about = path.read_text().partition("\n")[0].lstrip("# ")
            print(f"{name:<24} {about}")
        return 0
    if words[0] == "show" and len(words) == 2:
        print(recipe.find(words[1]).read_text(), end="")
        return 0
    if words[0] == "copy" and len(words) in (2, 3):
        source = recipe.find(words[1])
        target = Path(words[2] if len(words) == 3 else source.name)
        if target.is_dir():
            target = target / source.name
        if target.exists():
            raise UserError(f"{target} exists; name another file")
        target.write_text(source.read_text())
        print(f"wrote {target}; edit it, then: palate train {target} --output_dir out")
        return 0
    raise UserError("expected: palate recipes [list | show NAME | copy NAME [FILE]]")


def _miniature(words: list[str]) -> int:
    if not words or words[0] != "build":
        raise UserError("expected: palate miniature build [--work_dir DIR]")
    given = overrides(words[1:])
    unknown = [name for name in given if name != "work_dir"]
    if unknown:
        raise UserError(f"unknown option --{unknown[0]}{nearest(unknown[0], ['work_dir'])}")
    from palate.miniature.build import build_all

    build_all(Path(str(given.get("work_dir", "build"))))
    return 0
