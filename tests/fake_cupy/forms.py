"""The form of a callable, its parameters by name, kind and default, as far as it can be read from compiled code as well."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

BY_PLACE, POSITIONAL, KEYWORD, MANY, OPTIONS = "by place", "positional", "keyword", "*", "**"
_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: BY_PLACE,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: POSITIONAL,
    inspect.Parameter.VAR_POSITIONAL: MANY,
    inspect.Parameter.KEYWORD_ONLY: KEYWORD,
    inspect.Parameter.VAR_KEYWORD: OPTIONS,
}
REQUIRED = "no default"


class Parameter(NamedTuple):
    name: str
    kind: str
    default: Any


def form(function: Any, name: str) -> list[Parameter] | None:
    """Without self.  From its signature, or the one that Cython writes before a docstring; None where neither says it."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return written(name, (function.__doc__ or "").lstrip())
    parameters = [Parameter(p.name, _KINDS[p.kind], _default(p.default)) for p in found.parameters.values()]
    return [parameter for parameter in parameters if parameter.name != "self"]


def written(name: str, text: str) -> list[Parameter] | None:
    """From `name(intptr_t handle, int device_id=-1, *, out: Array = None) -> type` at the text's beginning."""
    match = re.match(rf"(?:\w+\.)?{re.escape(name)}\((.*?)\)(?: ->|\n|\Z|$)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        return None
    parameters, kind = [], POSITIONAL
    for part in _parts(match.group(1)):
        declared, _, default = part.partition("=")
        stars, word = re.match(r"(\**)(?:[\w\s]*\s)?(\w*)", declared.partition(":")[0].strip()).groups()
        if declared.strip() == "self":
            continue
        if declared.strip() == "/":
            parameters = [parameter._replace(kind=BY_PLACE) for parameter in parameters]
            continue
        if stars == "*" and not word:
            kind = KEYWORD
        elif stars:
            parameters.append(Parameter(word, stars, REQUIRED))
            kind = KEYWORD
        else:
            parameters.append(Parameter(word, kind, ast.literal_eval(default.strip()) if default else REQUIRED))
    return parameters


def shipped(module: str, name: str) -> list[Parameter] | None:
    """The form of a function of a compiled module that cannot be imported here, read from the file's docstrings."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    match = re.search(rb"\0(%s\([^\0]*\))" % name.encode(), Path(spec.origin).read_bytes())
    return written(name, match.group(1).decode()) if match else None


def differences(offered: list[Parameter], real: list[Parameter]) -> list[str]:
    """What somebody who calls by the offered form would find otherwise.  It may lack what has a default in the real one."""
    wrong, places = [], [parameter.name for parameter in real if parameter.kind in (BY_PLACE, POSITIONAL)]
    by_name = {parameter.name: parameter for parameter in real}
    unnamed = [parameter for parameter in offered if parameter.kind == BY_PLACE]
    if len(unnamed) != sum(parameter.kind == BY_PLACE for parameter in real):
        wrong.append(f"{len(unnamed)} are given by place alone here")
    offered = offered[len(unnamed) :]
    for place, (name, kind, default) in enumerate(offered, len(unnamed)):
        there = by_name.get(name)
        if there is None:
            wrong.append(f"{name} is not there")
        elif there.default != default:
            wrong.append(f"{name} is {there.default!r} there, {default!r} here")
        elif kind == POSITIONAL and (place >= len(places) or places[place] != name):
            wrong.append(f"{name} does not stand at {place} there")
        elif kind != there.kind and not (kind == KEYWORD and there.kind == POSITIONAL):
            wrong.append(f"{name} is {there.kind} there, {kind} here")
    names = {parameter.name for parameter in offered}
    wrong += [
        f"{p.name} is required there"
        for p in real
        if p.default == REQUIRED and p.kind == POSITIONAL and p.name not in names
    ]
    return wrong


def _parts(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _default(value: Any) -> Any:
    return REQUIRED if value is inspect.Parameter.empty else value
