"""Arguments described once, as fields of a dataclass: help in its docstring; type, default and flag with the field."""

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from inspect import Parameter, Signature, cleandoc, formatannotation, getdoc, signature
from numbers import Integral
from textwrap import fill
from typing import Any, Literal, get_args, get_origin, get_type_hints

from h2t_store.errors import H2TError

__all__ = ["argument", "check_choices", "integer", "list_arguments", "parameters"]


@dataclass(frozen=True)
class Flag:
    """How an argument is given on the command line: an option in a panel of the help, or a positional argument."""

    panel: str = ""
    metavar: str = ""
    names: tuple[str, ...] = ()
    shown: str = ""  # in place of the default
    kind: Any = None  # type, if other than in Python
    help: str = ""


def argument(default: Any, *flag: Any, **others: Any) -> Any:
    """A field that describes an argument, see `Flag`; MISSING is no default."""
    return field(default=default, metadata={"flag": Flag(*flag, **others)})


def parameters(described: type) -> list[Parameter]:
    """The described arguments, each with its `Flag` as annotation."""
    texts = dict(re.findall(r"^(\w+)\n((?:    .+\n?)+)", getdoc(described) or "", re.MULTILINE))
    kinds, found = get_type_hints(described), []
    for each in fields(described):
        flag, text = each.metadata["flag"], " ".join(texts.get(each.name, "").split())
        flag = replace(flag, help=text, kind=flag.kind or kinds[each.name])
        default = Parameter.empty if each.default is MISSING else each.default
        found.append(Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=flag))
    return found


def list_arguments(function: Callable[..., Any], *described: type) -> None:
    """Have help() list the arguments that a function takes as ``**arguments``: in signature and docstring."""
    own = {each.name: each for each in signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD}
    kinds = {name: kind for each in described for name, kind in get_type_hints(each).items()}
    found = [each for kind in described for each in parameters(kind)]
    others = [each.replace(annotation=kinds[each.name]) for each in found if each.name not in own]
    function.__signature__ = Signature([*own.values(), *others])  # type: ignore[attr-defined]
    texts = []
    for each in found:
        kind = "" if each.name in own else f" : {formatannotation(kinds[each.name])}"
        texts += [each.name + kind, fill(each.annotation.help, 112, initial_indent=" " * 4, subsequent_indent=" " * 4)]
    before, heading, after = cleandoc(function.__doc__ or "").partition("\n\nRaises\n")
    function.__doc__ = "\n".join([before, *texts]) + heading + after


def check_choices(described: Any) -> None:
    """Raise `H2TError` if a value is not one of the literals of its field, or not a bool."""
    for name, kind in get_type_hints(type(described)).items():
        value = getattr(described, name)
        choices = (True, False) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
        if choices and not (isinstance(value, bool | str) and value in choices):
            *first, last = map(str, choices)
            raise H2TError(f"{name} {value!r}: accepted are {', '.join(first)} and {last}")


def integer(name: str, value: Any, least: int, most: int = 2**63 - 1, besides: Any = MISSING) -> Any:
    """Return ``value`` if it is a whole number in the range, or what is accepted besides; else raise `H2TError`."""
    if value is besides or (isinstance(value, str) and value == besides):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        also = "" if besides is MISSING else f" and {besides!r}"
        raise H2TError(f"{name} {value!r}: accepted are whole numbers from {least} to {most}{also}")
    return int(value)
