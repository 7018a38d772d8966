"""Recipes as a JSON schema (draft 2020-12), by which editors complete and check them. It follows from the options' records."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from typing import Any

from palate import spaces
from palate.base.jsonl import JsonObject
from palate.base.options import OneOf, Range, default_of, field_docs, ranges
from palate.runs.methods import AUTO, SPACES, objectives
from palate.runs.recipe import RECORDS

PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema() -> JsonObject:
    """The schema of a recipe."""
    known = {name: function for name, (function, _) in objectives().items()}
    space = _named({name: getattr(spaces, name) for name in SPACES}, {"weight": {"type": "number"}})
    parts: JsonObject = {
        "objective": _named(known, {"beta": {"anyOf": [{"type": "number"}, {"const": AUTO}]}}),
        "space": {"anyOf": [space, {"type": "array", "items": space}]},
        **{name: _section(kind) for name, kind in RECORDS.items()},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of Palate",
        "type": "object",
        "properties": parts,
        "additionalProperties": False,
    }


def _section(kind: type) -> JsonObject:
    hints, about, admitted = typing.get_type_hints(kind), field_docs(kind), ranges(kind)
    return {
        "type": ["object", "null"],
        "description": " ".join(str(kind.__doc__).split()),
        "properties": {
            leaf.name: {
                "description": about.get(leaf.name, "").replace("``", ""),
                **_value(hints[leaf.name], admitted.get(leaf.name)),
                "default": _plain(default_of(leaf)),
            }
            for leaf in dataclasses.fields(kind)
        },
        "additionalProperties": False,
    }


def _value(hint: Any, admitted: Range | OneOf | None) -> JsonObject:
    """What an option may hold: one of its kinds, in its range."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    found = [_kind(one, admitted) for one in (typing.get_args(hint) if union else (hint,))]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _kind(hint: Any, admitted: Range | OneOf | None) -> JsonObject:
    origin = typing.get_origin(hint) or hint
    if origin is type(None):
        return {"type": "null"}
    text: JsonObject = {"type": "string"}
    if isinstance(admitted, OneOf):
        named = {"enum": list(admitted.choices)}
        text |= {"anyOf": [named, {"pattern": ":"}]} if admitted.or_class else named
    if origin is tuple:
        return {"anyOf": [{"type": "array", "items": text}, text]}
    if origin is dict:
        return {"type": "object"}
    if origin is str:
        return text
    return {"type": PLAIN[origin], **(_bounds(admitted) if isinstance(admitted, Range) else {})}


def _bounds(admitted: Range) -> JsonObject:
    names = {"minimum": "at_least", "exclusiveMinimum": "above", "maximum": "at_most", "exclusiveMaximum": "below"}
    found = {theirs: getattr(admitted, ours) for theirs, ours in names.items()}
    return {name: bound for name, bound in found.items() if bound is not None and math.isfinite(bound)}


def _named(known: dict[str, Any], also: JsonObject) -> JsonObject:
    """A name, or a mapping with it and its keywords: those of each function, any of one from outside."""
    keywords: JsonObject = {}
    for function in known.values():
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = {}
    told = {"anyOf": [{"enum": list(known)}, {"type": "string", "pattern": "^[\\w.]+:\\w+$"}]}
    mapping = {"type": "object", "required": ["name"], "properties": {"name": told, **keywords, **also}}
    return {"anyOf": [told, mapping]}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
