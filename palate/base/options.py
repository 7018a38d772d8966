"""Options: words of the command line and values of YAML to checked dataclasses, and back to a page of help."""

from __future__ import annotations

# PyYAML's methods have no types.
# pyright: reportUnknownMemberType=false
import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar, cast

import yaml

from palate.base.errors import UserError, broken, nearest, said, short

Options = TypeVar("Options")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a plain word, where 1.1 surprises: ``no`` is text, ``1e-4`` a number, a date text."""


class _AskingLoader(_Loader):
    """A question mark does not end a word inside brackets: ``[pickscore:FOLDER?dtype=bfloat16]``.

    It looks at every letter once more, so it is for texts that have one.
    """

    _in_word = False

    def scan_plain(self) -> object:
        self._in_word = True
        try:
            return cast(object, super().scan_plain())
        finally:
            self._in_word = False

    def peek(self, index: int = 0) -> str:
        found = cast(str, super().peek(index))
        return "q" if self._in_word and found == "?" else found  # any letter: what is read is not taken from here


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version would read as something else than text."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unquoted, PyYAML writes some line breaks as they are and reads them as a space.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)

_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse(text: str, where: str) -> object:
    """YAML to plain values; ``where`` begins the message of a :class:`UserError`."""
    try:
        return yaml.load(text, Loader=_AskingLoader if "?" in text else _Loader)  # both are SafeLoaders
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable YAML: {said(error, 240)}") from error


def dumps(content: object) -> str:
    """Plain values as YAML that :func:`parse` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Bare:
    """What an option has that stands without a value: true, of a switch; of another it is refused, once its name is known."""

    def __repr__(self) -> str:
        return "nothing"


BARE = _Bare()


def overrides(words: Sequence[str]) -> dict[str, object]:
    """``--name value``, ``--name=value`` and switches alone to a dictionary, hyphens of names as underscores.

    Values stay text, but for lists and mappings in YAML.
    """
    found: dict[str, object] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"{short(word)} is not an option; expected --name value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if not queue or queue[0].startswith("--"):
                found[name] = BARE
                continue
            text = queue.pop(0)
        found[name] = parse(text, f"--{short(name, quoted=False)}") if text[:1] in ("[", "{") else text
    return found


def checked(kind: type[Options], given: Mapping[str, object], command: str) -> Options:
    """An options dataclass from ``overrides``; unknown names are refused with the nearest right one.

    Raises:
        UserError: an unknown option, a missing one (a field without a default), or a value of the wrong type.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise UserError(f"{command}: unknown option --{short(name, quoted=False)}{nearest(name, known)}")
    for name, leaf in known.items():
        if name not in given and leaf.default is leaf.default_factory is dataclasses.MISSING:
            raise UserError(f"{command} needs --{name}; '{command} --help' explains it")
    return section(kind, given, command)


def help_lines(kind: type, given: Mapping[str, object] | None = None, only: Collection[str] | None = None) -> list[str]:
    """Every field of an options dataclass: ``--name CHOICES (default: ...)`` and what the string below it says.

    given: what stands in place of defaults, by name; only: the fields that are told, in this order.
    """
    about, admitted, known = field_docs(kind), ranges(kind), {leaf.name: leaf for leaf in fields(kind)}
    lines: list[str] = []
    for name in known if only is None else only:
        leaf, one = known[name], admitted.get(name)
        texts = (*one.choices, *(["package.module:Class"] if one.or_class else [])) if isinstance(one, OneOf) else ()
        choices = f" {' | '.join(texts)}" if texts else ""
        is_given = given is not None and name in given
        value = cast("Mapping[str, object]", given)[name] if is_given else default_of(leaf)
        shown = "" if value is None or value in ((), [], {}) else f" ({'here' if is_given else 'default'}: {as_yaml(value)})"
        lines += [f"  --{name}{choices}{shown}", *indented(about.get(name, ""))]
    return lines


def leaves(values: Mapping[str, object], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Nested values with the names that lead to them, from the outside in; an empty mapping is a value."""
    for name, value in values.items():
        names = (*above, str(name))
        if isinstance(value, Mapping) and value:
            yield from leaves(cast("Mapping[str, object]", value), names)
        else:
            yield names, value


def default_of(leaf: dataclasses.Field[Any]) -> object:
    """What a field of a dataclass stands at; None too where it has to be given."""
    if leaf.default_factory is not dataclasses.MISSING:
        return leaf.default_factory()
    return None if leaf.default is dataclasses.MISSING else leaf.default


def as_yaml(value: object) -> str:
    """A value as it is written in a recipe and on the command line."""
    if isinstance(value, str):
        return value
    plain = list(cast("tuple[object, ...]", value)) if isinstance(value, tuple) else value
    return (
        yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6)
        .removesuffix("...\n")
        .strip()
    )


def section(kind: type[Options], value: object, where: str) -> Options:
    """An options dataclass from a mapping of names to values; ``where`` begins the message of a :class:`UserError`."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        raise UserError(f"{where} holds {short(value)}; expected options such as {', '.join(known[:3])}")
    hints, made = typing.get_type_hints(kind), dict[str, object]()
    for name, given in cast("Mapping[str, object]", value).items():
        if name not in known:
            raise UserError(f"{where}: unknown option {short(name)}{nearest(str(name), known)}")
        made[name] = typed(hints[name], given, name)
    return kind(**made)


@dataclass(frozen=True)
class Range:
    """The numbers that an option admits, said beside its type: ``Annotated[float, Range(above=0, below=1, ...)]``.

    ``expected`` says them in the message; what is not a number (NaN) is never admitted.
    """

    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None
    expected: str = ""

    def refusal(self, value: int | float) -> str:
        """What follows "NAME is" in the message about ``value``; empty if it is admitted."""
        admitted = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        if admitted:
            return _out_of_size(value)
        expected = f"at most {MANY}" if self.at_most == MANY < value else self.expected
        return f"{short(value, quoted=False)}; expected {expected}"


SMALLEST, LARGEST = 1e-30, 1e30
"""Of fractions, by their size: float32, in which all is computed, ends a little beyond, and products of two must fit too."""


def _out_of_size(value: int | float) -> str:
    """As :meth:`Range.refusal`, of a fraction that float32 turns into 0 or infinity; infinity itself may stand for no limit."""
    if isinstance(value, int) or not value or not math.isfinite(value) or SMALLEST <= abs(value) <= LARGEST:
        return ""
    end = f"above {SMALLEST:g}, or 0" if abs(value) < SMALLEST else f"below {LARGEST:g}"
    return f"{value:g}, which float32 does not hold; expected a number of a size {end}"


@dataclass(frozen=True)
class OneOf:
    """The texts that an option admits, or each text of a list of them: ``Annotated[str, OneOf("drop", "keep")]``.

    or_class: whether ``package.module:Class`` is admitted too.
    """

    choices: tuple[str, ...]
    or_class: bool

    def __init__(self, *choices: str, or_class: bool = False) -> None:
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "or_class", or_class)

    def refusal(self, value: str | tuple[str, ...]) -> str:
        """As :meth:`Range.refusal`."""
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if not (self.or_class and ":" in text)]
        also = "; or package.module:Class" if self.or_class else ""
        wrong = (text for text in texts if text not in self.choices)
        return next((f"{short(text)}{nearest(str(text), self.choices)}{also}" for text in wrong), "")


def at_least(least: int, at_most: int | None = None) -> Range:
    """The whole numbers from ``least`` on, which end somewhere: beyond a thousand million nothing that is counted here ends."""
    expected = f"at least {least}" if at_most is None else f"{least} to {at_most}"
    return Range(at_least=least, at_most=at_most or MANY, expected=expected)


Quantize = Annotated[str, OneOf("int8", "nf4")] | None
"""Number formats of a network's frozen blocks; None for that of its precision."""
MANY = 10**9
Count = Annotated[int, at_least(1)]
BATCH = at_least(1, 2**16)
"""Of what is held in memory at once."""
Batch = Annotated[int, BATCH]
STEPS = at_least(1, 1000)
"""Of sampling: no schedule of these families has more times."""
Steps = Annotated[int, STEPS]
RANK = at_least(1, 4096)
"""Of a LoRA: no layer of a model that is read here has more inputs and more outputs, so no change of it has a higher rank."""
Rank = Annotated[int, RANK]
SEED = Range(at_least=-(2**63), at_most=2**64 - 1, expected="a whole number from -2**63 to 2**64 - 1")
"""What PyTorch takes; ComfyUI's greatest is the last of them."""
Seed = Annotated[int, SEED]
NOT_NEGATIVE = Range(at_least=0, below=math.inf, expected="0 or more")
POSITIVE = Range(above=0, below=math.inf, expected="a positive number")
GUIDANCE = Range(at_least=0, at_most=1000, expected="0 to 1000; 1 is none, 5 to 8 are usual")
SECONDS = Range(above=0, at_most=10**7, expected="a positive number of seconds, at most 10000000")
Port = Annotated[int, Range(at_least=0, below=65536, expected="a number from 1 to 65535, or 0 for any")]
FRACTION = Range(above=0, below=1, expected="a number between 0 and 1")


@functools.cache
def ranges(kind: type) -> dict[str, Range | OneOf]:
    """Option -> what it admits, of those options of a dataclass that say it in their annotation."""
    found: dict[str, Range | OneOf] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for one in _said(hint):
            if isinstance(one, Range | OneOf):
                found[name] = one
    return found


def _said(hint: object) -> Iterable[object]:
    """What an annotation holds besides types, and the types of which it is the union."""
    inner = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else ()
    return itertools.chain(getattr(hint, "__metadata__", ()), *map(_said, inner))


def check_ranges(options: object) -> None:
    """Check every option of a dataclass that says its range or choices; None is always admitted. For ``__post_init__``.

    Raises:
        UserError: the first that lies outside.
    """
    for name, admitted in ranges(type(options)).items():
        value = getattr(options, name)
        if value is not None and (refusal := admitted.refusal(value)):
            raise UserError(f"{name} is {refusal}")


WORDS = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text",
    tuple: "a list of texts",
    dict: "a mapping",
}
NOTHING = ("null", "none", "~", "[]", "{}")


def typed(kind: Any, value: object, name: str) -> object:
    """``value`` as ``kind``; from the command line every value comes as text."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    kinds = [typing.get_origin(option) or option for option in options if option is not type(None)]
    if value is BARE:
        if bool in kinds:
            return True
        raise UserError(f"--{name} lacks a value; expected {' or '.join(WORDS.get(k, str(k)) for k in kinds)}")
    if is_nothing(value):
        if type(None) in options:
            return None
        if tuple in kinds:
            return ()
        if dict in kinds:
            return {}
    for option in options:
        if option is type(None):
            continue
        try:
            made: object = _as(option, value)
        except (TypeError, ValueError, OverflowError):
            continue
        if isinstance(made, float) and (refusal := _out_of_size(made)):
            raise UserError(f"{name} is {refusal}")
        if broken(made) or _has_nul(made):
            raise UserError(f"{name} is {short(made)}, which is no valid text: expected Unicode, without the character NUL")
        return made
    expected = [*(WORDS.get(k, str(k)) for k in kinds), *(["null"] if type(None) in options else [])]
    raise UserError(f"{name} is {short(value)}; expected {' or '.join(expected)}")


def _has_nul(value: object) -> bool:
    """Whether a text, or one of a list of them, holds the character that ends a path."""
    texts = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
    return any("\0" in text for text in texts if isinstance(text, str))


def is_nothing(value: object) -> bool:
    """Whether a value is one of the words for nothing, which mean the same wherever an option may be empty."""
    if isinstance(value, str):
        return value.strip().lower() in NOTHING
    return value is None or (isinstance(value, Sequence | Mapping) and not value)


def _as(wanted: Any, value: object) -> object:
    kind = typing.get_origin(wanted) or wanted
    if kind is object:  # as YAML has it
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False}[value] if value in ("true", "false") else _refuse()
    if kind is tuple:
        if isinstance(value, str):
            return (value,)
        return tuple(_as(str, v) for v in cast("Sequence[object]", value)) if isinstance(value, Sequence) else _refuse()
    if kind is dict:
        pairs = cast("Mapping[object, object]", value).items() if isinstance(value, Mapping) else _refuse()
        of_values = (*typing.get_args(wanted), str, str)[1]
        return {_as(str, k): _as(of_values, v) for k, v in pairs}
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        _refuse()
    if kind is float:
        number = float(value)
        return _refuse() if math.isnan(number) else number
    if kind is int:
        return _whole(value)
    if kind is str:
        return str(value)
    return _refuse()


def _whole(value: str | int | float) -> int:
    """Digit by digit where it is written so: a float holds only the first sixteen, and seeds have twenty."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:  # 1e3 is a whole number too
            pass
    number = float(value)
    return value if isinstance(value, int) else int(number) if number.is_integer() else _refuse()


def _refuse() -> typing.NoReturn:
    raise TypeError


def changed(options: Any) -> list[str]:
    """The names of those options that are not at their default; every option has one."""
    plain = type(options)()
    return [f.name for f in fields(options) if getattr(options, f.name) != getattr(plain, f.name)]


def foreign(name: str, known: Iterable[str] = ()) -> Callable[..., Any]:
    """The function ``module:function``, importable from here; ``known``: what a misspelt module may have been meant for.

    Raises:
        UserError: there is none, or its module fails.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # the script's own folder is there instead
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        hint = nearest(module, known) if missing and difflib.get_close_matches(module, known, n=1) else ""
        raise UserError(f"{name}: {said(error)}; expected package.module:function, importable from here{hint}") from error
    except (Exception, SystemExit) as error:  # of the user's own code, which may raise anything
        raise UserError(f"{name}: importing {module} raised {type(error).__name__}: {said(error)}; mend it") from error
    if not callable(function):
        raise UserError(f"{name} is {type(function).__name__}; expected a function")
    return function


def keywords(function: Callable[..., object], given: Mapping[str, object], what: str) -> dict[str, Any]:
    """All keyword-only arguments of ``function``: those given, as the types it names, and its defaults."""
    known = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name in given:
        if name not in known:
            raise UserError(f"{what} has no option {name!r}{nearest(str(name), known) if known else ' (it has none)'}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: name: {what.split()[-1]}, {missing[0]}: ... in its recipe")
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # of a function from outside, whose annotations need not be importable
        hints = {}
    made: dict[str, Any] = {}
    for name, parameter in known.items():
        value = given.get(name, parameter.default)
        if value is BARE and hints.get(name) is not bool:
            raise UserError(f"{what}: {name} lacks a value")
        # What comes unannotated from the command line is read as YAML; a default that is a fraction tells of a number.
        unnamed = parse(value, name) if isinstance(value, str) else value
        if type(parameter.default) is float and type(unnamed) is int:
            unnamed = float(unnamed)
        made[name] = typed(hints[name], value, f"{what}: {name}") if name in hints else unnamed
        if made[name] in (math.inf, -math.inf):
            raise UserError(f"{what}: {name} is {made[name]}; expected a number that ends")
    return made


def indented(text: str) -> list[str]:
    return textwrap.wrap(text.replace("``", ""), 96, initial_indent=" " * 8, subsequent_indent=" " * 8)


def field_docs(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of those it builds on; Python itself drops them."""
    found: dict[str, str] = {}
    for base in kind.__bases__:
        if dataclasses.is_dataclass(base):
            found |= field_docs(base)
    (written,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(written, ast.ClassDef)
    for before, after in itertools.pairwise(written.body):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[before.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return found
