"""``palate vote``: a page on which people judge pictures; their votes out and in."""

from __future__ import annotations

from palate.base.errors import UserError, nearest
from palate.base.options import checked, help_lines, overrides
from palate.verbs import asks_help

USAGE = (
    "palate vote DIR [--option value ...] | palate vote results DIR --output results.html | "
    "palate vote export DIR --output FILE | palate vote import DIR --input FILE"
)
KINDS = ("results", "export", "import")


def main(words: list[str]) -> int:
    if asks_help(words):
        print(_help())
        return 0
    if words[0] in KINDS:
        return _carry_out(words[0], words[1:])
    if words[0].startswith("--"):
        raise UserError(f"palate vote expects a folder of pictures first: {USAGE}")
    if len(words) > 1 and not words[1].startswith("--"):
        raise UserError(f"{words[0]!r} is followed by {words[1]!r}{nearest(words[0], KINDS)}: {USAGE}")
    from palate.votes.server import serve
    from palate.votes.study import VoteOptions

    serve(words[0], checked(VoteOptions, overrides(words[1:]), "palate vote"))
    return 0


def _carry_out(kind: str, words: list[str]) -> int:
    from palate.votes import exchange, share

    if not words or words[0].startswith("--"):
        raise UserError(f"palate vote {kind} expects the folder of the votes first: {USAGE}")
    folder, given, command = words[0], overrides(words[1:]), f"palate vote {kind}"
    if kind == "results":
        print(share.share(folder, checked(share.ShareOptions, given, command)))
    elif kind == "export":
        print(exchange.export_votes(folder, checked(exchange.ExportOptions, given, command)))
    else:
        print(exchange.import_votes(folder, checked(exchange.ImportOptions, given, command)))
    return 0


def _help() -> str:
    from palate.votes.exchange import ExportOptions, ImportOptions
    from palate.votes.share import ShareOptions
    from palate.votes.study import VoteOptions

    return "\n".join(
        [
            USAGE.replace(" | ", "\n"),
            "",
            "DIR is a folder of pictures, or one that holds several, each of a model. Prompts come from manifest.jsonl, as",
            "'palate generate' writes it, from a .txt beside a picture, from what A1111, ComfyUI or SwarmUI wrote into it, or",
            "from its name.",
            "",
            "the page",
            *help_lines(VoteOptions),
            "results",
            *help_lines(ShareOptions),
            "export",
            *help_lines(ExportOptions),
            "import",
            *help_lines(ImportOptions),
        ]
    )
