"""``palate completion``: a script that completes verbs, recipes, options and their choices in a shell."""

from __future__ import annotations

from palate.base.errors import UserError, nearest
from palate.verbs import asks_help
from palate.verbs.table import VERBS

USAGE = "palate completion bash|zsh|fish"
ABOUT = """\
Prints a script for the shell. For good, in the file that it reads at its start:
  bash, in ~/.bashrc                      eval "$(palate completion bash)"
  zsh, in ~/.zshrc                        eval "$(palate completion zsh)"
  fish, into ~/.config/fish/completions/  palate completion fish > ~/.config/fish/completions/palate.fish"""
SHELLS = ("bash", "zsh", "fish")
JUDGED = ("judges", "rewards", "held_out_rewards", "trained_on")
"""Options that take names of judges."""


def main(words: list[str]) -> int:
    if asks_help(words):
        print(f"{USAGE}\n\n{ABOUT}")
        return 0
    if len(words) != 1 or words[0] not in SHELLS:
        raise UserError(f"no completion for {words[0]!r}{nearest(words[0], SHELLS)}: {USAGE}")
    print(_fish() if words[0] == "fish" else _bash(zsh=words[0] == "zsh"))
    return 0


def _words() -> dict[str, tuple[list[str], list[str]]]:
    """Of every verb what may come first, and its options."""
    from palate.runs.library import built_in
    from palate.verbs.every import records

    recipes = list(built_in())
    first = {
        "train": recipes,
        "plan": recipes,
        "encode": recipes,
        "recipes": ["show", "copy", "schema", *recipes],
        "vote": ["results", "export", "import"],
    }
    first |= {"completion": [*SHELLS], "serve-judge": _judges()}
    found = {}
    for verb in VERBS:
        kinds = [*records(verb).values(), *(records("train").values() if verb in ("plan", "encode") else ())]
        names = [name for kind in kinds for name in kind.__dataclass_fields__]
        names += ["objective", "space"] if verb in ("train", "plan", "encode") else []
        found[verb] = (first.get(verb, []), [f"--{name}" for name in dict.fromkeys([*names, "help"])])
    return found


def _judges() -> list[str]:
    from palate.judges.kinds import KINDS
    from palate.miniature import world

    return [*KINDS, *world.JUDGES]


def _choices() -> dict[str, list[str]]:
    """What an option may hold, of those that have few values; by name, whatever the verb."""
    from palate.base.options import OneOf, ranges
    from palate.runs.methods import SPACES, objectives
    from palate.verbs.every import records

    found = {"objective": [*objectives()], "space": [*SPACES], **{name: _judges() for name in JUDGED}}
    for kind in (kind for verb in VERBS for kind in records(verb).values()):
        for name, admitted in ranges(kind).items():
            if isinstance(admitted, OneOf):
                found[name] = list(dict.fromkeys([*found.get(name, []), *admitted.choices]))
    return found


def _bash(*, zsh: bool) -> str:
    words = _words()
    values = "\n".join(f'    --{name}) words="{" ".join(found)}" ;;' for name, found in _choices().items())
    verbs = "\n".join(
        f'      {verb}) options="{" ".join(options)}"; first="{" ".join(first)}" ;;' for verb, (first, options) in words.items()
    )
    begin = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return f"""{begin}_palate() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words="" options="" first=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(words)} --help --version" -- "$word"))
    return
  fi
  case "$before" in
{values}
  esac
  if [ -z "$words" ]; then
    case "${{COMP_WORDS[1]}}" in
{verbs}
    esac
    case "$word" in
      -*) words="$options" ;;
      *) if [ "$COMP_CWORD" -eq 2 ] || [ "$before" = show ] || [ "$before" = copy ]; then words="$first"; fi ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _palate palate"""


def _fish() -> str:
    choices, lines = _choices(), ["complete -c palate -l help", "complete -c palate -l version"]
    for verb, (first, options) in _words().items():
        about = VERBS[verb].partition(":")[0].replace("'", "\\'")
        lines.append(f"complete -c palate -n __fish_use_subcommand -a {verb} -d '{about}'")
        after = f"complete -c palate -n '__fish_seen_subcommand_from {verb}'"
        lines += [f"{after} -a '{' '.join(first)}'"] if first else []
        for name in (option.removeprefix("--") for option in options):
            known = choices.get(name)
            lines.append(f"{after} -l {name}" + (f" -x -a '{' '.join(known)}'" if known else ""))
    return "\n".join(lines)
