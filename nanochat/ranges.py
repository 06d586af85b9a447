"""Ranges of options, as part of their types in a dataclass of options: `depth: Count = 20`."""

import typing
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Literal, get_args, get_origin

from nanochat.common import UserError

BOUNDLESS = 1e12  # an upper bound of this or more only excludes absurd values, and is not shown


@dataclass(frozen=True)
class Range:
    """Annotation of a number: from `least` to `most`; also -1 if that is the default or or_minus_one is True."""

    least: float
    most: float = BOUNDLESS
    or_minus_one: bool = False

    def __contains__(self, value):
        return self.least <= value <= self.most or (self.or_minus_one and value == -1)

    def __str__(self):
        text = f"{self.least:,} or more" if self.most >= BOUNDLESS else f"from {self.least:,} to {self.most:,}"
        return text + ", or -1" * self.or_minus_one


Count = Annotated[int, Range(1)]
CountOr0 = Annotated[int, Range(0)]
CountOrAll = Annotated[int, Range(1, or_minus_one=True)]
Every = Annotated[int, Range(-1)]
"""Number of steps between two events; 0 and -1 for never."""
Fraction = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0, 1e30)]


@cache
def rules(cls) -> dict:
    """Field → its Range, or the values of its Literal, for the fields of a dataclass that have one."""
    hints, found = typing.get_type_hints(cls, include_extras=True), {}
    for field in fields(cls):
        ranges = [part for part in get_args(hints[field.name])[1:] if isinstance(part, Range)]
        if ranges:
            also = ranges[0].or_minus_one or field.default == -1
            found[field.name] = Range(ranges[0].least, ranges[0].most, also and ranges[0].least > -1)
        elif get_origin(hints[field.name]) is Literal:
            found[field.name] = get_args(hints[field.name])
    return found


def check(options):
    """Raise UserError for an option out of range, in a dataclass or in dataclasses that are its fields."""
    for name, allowed in rules(type(options)).items():
        value = getattr(options, name)
        if value is not None and value not in allowed:
            what = allowed if isinstance(allowed, Range) else f"one of {', '.join(map(str, allowed))}"
            raise UserError(f"--{name}: expected {what}, got {value!r}")
    for field in fields(options):
        if is_dataclass(getattr(options, field.name)):
            check(getattr(options, field.name))
