"""Prompts by the names that recipes and commands use."""

from __future__ import annotations

import re
from pathlib import Path

from palate.base.errors import UserError, nearest, short
from palate.base.options import foreign
from palate.data import prompt_sets, prompts
from palate.data.prompts import Prompt
from palate.miniature import prompt_lists


def find_prompts(name: str | Path) -> list[Prompt]:
    """The prompts that go by a name, in order.

    That is a built-in list (``animals``), a list of the miniature world (``miniature-unseen``), a published set (``drawbench``,
    or ``drawbench:FILE``), a function ``module:function``, or a text or JSONL file.

    Raises:
        UserError: an unknown name, a file that cannot be read, or no prompts.
    """
    text = str(name)
    if text in prompts.LISTS:
        return prompts.built_in(text)
    if text in prompt_lists.NAMES:
        return prompt_lists.find(text)
    published, _, file = text.partition(":")
    if published in prompt_sets.SETS:
        return prompt_sets.load_prompt_set(published, file or None)
    path = Path(name).expanduser()
    if path.exists():
        return prompts.read_prompts(path)
    if re.fullmatch(r"[\w.]+:\w+", text):
        return prompts.from_function(foreign(text, prompt_sets.SETS), text)
    if text.lower() in ("no", "false", "off"):
        raise UserError(f"no file and no list of prompts {short(text)}; for none write null")
    if " " in text.strip() and not path.suffix:
        raise UserError(f"there is no file {short(text, 100)}; if it is a prompt, write it into a text file, one prompt a line")
    if re.fullmatch(r"[\w-]+", text):
        known = [*prompts.LISTS, *prompt_lists.NAMES, *prompt_sets.SETS]
        raise UserError(f"no file and no list of prompts {short(text)}{nearest(text, known)}")
    return prompts.read_prompts(path)
