"""Turns a settings class into argparse flags: its fields are the flags, their types the values."""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from utils import UserError

Auto = Literal["auto"]


def flag(
    group: str,
    help: str,
    low: float = 0,
    high: float = math.inf,
    trait: str = "",
    count: int | None = None,
) -> Any:
    """A field of a settings class and the flag of the same name, under a heading of --help.

    The field's type says what the flag takes: numbers from `low` to `high`, or text; a word of a
    Literal; with `| None` also the word null; a list takes `count` of them, or any number;
    `int | list[int]` one or two, and one is no list; a bool is --name or --no-name.
    """
    metadata = {"group": group, "help": help, "low": low, "high": high, "trait": trait}
    return dataclasses.field(metadata={**metadata, "count": count})


@dataclass(frozen=True)
class Value:
    """What a flag takes; as argparse's `type` it turns text into the value."""

    type: type  # bool, int, float or str
    low: float
    high: float
    choices: tuple[str, ...]
    word: str | None  # auto stays as it is, null becomes None
    many: bool
    one_or_two: bool
    count: int | None  # of a list, if that is fixed

    @classmethod
    def of(cls, field: dataclasses.Field) -> "Value":
        parts = [field.type]
        if typing.get_origin(field.type) in (typing.Union, types.UnionType):
            parts = list(typing.get_args(field.type))
        type_, many = parts[0], any(typing.get_origin(part) is list for part in parts)
        one_or_two = many and typing.get_origin(type_) is not list
        if many and not one_or_two:
            (type_,) = typing.get_args(type_)
        choices = typing.get_args(type_) if typing.get_origin(type_) is Literal else ()
        null = "null" if type(None) in parts and not many else None
        word = "auto" if Auto in parts[1:] else null
        type_ = str if choices else type_
        low, high, count = (field.metadata[name] for name in ("low", "high", "count"))
        return cls(type_, low, high, choices, word, many, one_or_two, count)

    def __call__(self, text: str) -> int | float | str | None:
        if text == self.word:
            return None if text == "null" else text
        if self.type is str and text:
            if (
                "\0" in text
                or len(text) > 3000
                or max(map(len, os.fsencode(text).split(b"/"))) > 230
            ):
                reason = "is not valid: no file can have this name; use a short one"
                raise argparse.ArgumentTypeError(f"{text[:60]!r} {reason}")
            return text
        with contextlib.suppress(ValueError, OverflowError):
            value = float(text)
            if self.type is int:  # 1e6 is one, too, but not every large one is a float
                value = int(value) if "e" in text.lower() and value.is_integer() else int(text)
            if self.low <= value <= self.high and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: it must be {self}")

    def __str__(self) -> str:
        name = {int: "a whole number", float: "a number", str: "text"}[self.type]
        if self.type is not str and self.low > -math.inf:
            bound = f"to {self.high:g}" if self.high < math.inf else "up"
            name += f" from {self.low:g} {bound}"
        return name + (f", or {self.word}" if self.word else "")

    def options(self, name: str) -> dict[str, Any]:
        """The options of argparse's add_argument."""
        if self.type is bool:
            return {"action": argparse.BooleanOptionalAction}
        options = {"type": self, "nargs": (self.count or "*") if self.many else None}
        if self.one_or_two:
            options |= {"nargs": "+", "action": OneOrTwo}
        if not self.choices:
            return options | {"metavar": name.upper()}
        taken = (*self.choices, None) if self.word == "null" else self.choices
        return options | {"choices": taken, "metavar": f"{{{','.join(self.choices)}}}"}


class OneOrTwo(argparse.Action):
    """One value as itself, two as a list."""

    def __call__(self, parser: "Parser", found: Any, values: list, name: str | None = None) -> None:
        if len(values) > 2 or len(values) == 2 and "auto" in values:
            parser.error(f"{name}: {show(values)} is not valid: give one value, or two")
        setattr(found, self.dest, values if len(values) == 2 else values[0])


class Parser(argparse.ArgumentParser):
    """argparse, but an error is a UserError, and a flag is never abbreviated."""

    def __init__(self, description: str | None) -> None:
        plain = argparse.RawDescriptionHelpFormatter
        usage = "%(prog)s [flags]"
        super().__init__(
            usage=usage, description=description, formatter_class=plain, allow_abbrev=False
        )
        # what is a value and no flag; argparse's own takes -1e-5 for a flag
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see --help)")


def add_flags(parser: Parser, cls: type, defaults: Mapping[str, Any]) -> None:
    """Add a flag for each field of a settings class, with its default in the help.

    What has no default must be given, by its place.
    """
    fields = dataclasses.fields(cls)
    titles = dict.fromkeys(field.metadata["group"] for field in fields)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for field in fields:
        group, help = groups[field.metadata["group"]], field.metadata["help"].replace("%", "%%")
        options = Value.of(field).options(field.name)
        if field.name in defaults:
            help += f" (default: {show(defaults[field.name])})"
            group.add_argument(f"--{field.name}", help=help, **options)
        else:
            group.add_argument(field.name, help=help, **options)


def to_words(cls: type, values: Mapping[str, Any]) -> list[str]:
    """Values as words of a command line: the parser checks them, wherever they come from."""
    words = []
    for field in dataclasses.fields(cls):
        name, takes = field.name, Value.of(field)
        if name not in values:
            continue
        value = values[name]
        if isinstance(value, bool) != (takes.type is bool):
            must = "true or false" if takes.type is bool else str(takes)
            raise UserError(f"--{name}: {value!r} is not valid: it must be {must}")
        if value is None and takes.word != "null" and (takes.one_or_two or not takes.many):
            raise UserError(f"--{name}: null is not valid: it must be {takes}")
        if takes.type is bool:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif not takes.many:
            words.append(f"--{name}={'null' if value is None else value}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def show(value: Any) -> str:
    """A value as on the command line."""
    value = "null" if value is None else value
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
