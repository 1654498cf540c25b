"""Checks of values, and amounts as people write them: 1G multiply-adds, 10M parameters, 100MB, 8GiB, 20ms.

Every check raises ArgumentError, which names the argument, its value and the rule.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from decimal import Decimal
from numbers import Real
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeVar, get_args

from effnet.errors import ArgumentError, UnknownNameError

T = TypeVar("T")

COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
BYTES = {"B": 1} | {
    f"{prefix}{kind}B": base**power
    for power, prefix in enumerate("kMGT", start=1)
    for kind, base in (("", 1000), ("i", 1024))
}
SECONDS = {"ms": Decimal("1e-3"), "s": Decimal(1), "us": Decimal("1e-6")}
PLAIN = {"": 1}  # of a number that is not text
SINGULAR = {"": "", "are": "is", "have": "has"}

LARGEST = 10**15  # multiply-adds, parameters, bytes or seconds: beyond any network, and 64 bits hold it
LARGEST_WHOLE = 2**63 - 1  # of what counts steps, images or pixels, in Python's own loops, too
# Commas separate thousands, as in effnet's own output; 1,5G is invalid.
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*)"
AMOUNT = re.compile(rf"({WHOLE}\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([a-z]*)", re.IGNORECASE)


def positive_float(argument: str, value: SupportsFloat) -> float:
    """`value` as a float; it must be positive and finite."""
    result = number(argument, value)
    if not (result > 0 and math.isfinite(result)):
        raise ArgumentError(argument, value, "must be a positive finite number.")
    return result


def positive_int(argument: str, value: SupportsIndex) -> int:
    """`value` as an int; it must be a positive whole number."""
    return _integer(argument, value, 1, "must be a positive whole number.")


def one_of(argument: str, value: str, choices: Any) -> None:
    """Raise UnknownNameError unless `value` is among the values of the Literal type `choices`."""
    if value not in get_args(choices):
        raise UnknownNameError(argument, value, get_args(choices))


def read_fields(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass `cls` from a mapping that must name its fields and nothing else."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # no bound says: a dataclass
    for name in mapping(cls, values):
        if name not in fields:
            raise UnknownNameError(f"{cls.__name__} field", name, fields)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ArgumentError(f"{cls.__name__} field", name, "is missing.")
    return cls(**values)


def mapping(cls: type[Any], values: Any) -> Mapping[str, Any]:
    """`values`, which must be a mapping."""
    if not isinstance(values, Mapping):
        raise ArgumentError(cls.__name__, values, "must be a mapping from the names of its fields to their values.")
    return values


def rate(argument: str, value: SupportsFloat) -> float:
    """`value` as a rate: at least 0 and below 1."""
    result = number(argument, value)
    if not 0 <= result < 1:
        raise ArgumentError(argument, value, "must be a rate: at least 0 and below 1.")
    return result


def ratio(argument: str, value: SupportsFloat) -> float:
    """`value` as a ratio: at least 0 and at most 1."""
    result = number(argument, value)
    if not 0 <= result <= 1:
        raise ArgumentError(argument, value, "must be at least 0 and at most 1.")
    return result


def non_negative_float(argument: str, value: SupportsFloat) -> float:
    """`value` as a finite number of at least 0."""
    result = number(argument, value)
    if not 0 <= result < math.inf:
        raise ArgumentError(argument, value, "must be a finite number of at least 0.")
    return result


def non_negative_int(argument: str, value: SupportsIndex) -> int:
    """`value` as an int of at least 0."""
    return _integer(argument, value, 0, "must be a whole number of at least 0.")


def seed_number(argument: str, value: SupportsIndex) -> int:
    """`value` as a seed, which numpy's older generator takes: a whole number of 32 bits."""
    result = non_negative_int(argument, value)
    if result >= 2**32:
        raise ArgumentError(argument, value, "must be at most 4294967295 (2^32 - 1).")
    return result


def number(argument: str, value: SupportsFloat) -> float:
    """`value` as a float; text and booleans are refused."""
    if not isinstance(value, (bool, str)):
        with suppress(TypeError, ValueError, OverflowError):  # of an array with several numbers, for example
            return float(value)
    raise ArgumentError(argument, value, "must be a number.")


def finite_floats(argument: str, values: Any) -> tuple[float, ...]:
    """`values` as finite floats."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ArgumentError(argument, values, "must be a list of numbers.")
    numbers = tuple(number(argument, value) for value in values)
    if not all(map(math.isfinite, numbers)):
        raise ArgumentError(argument, values, "must be finite.")
    return numbers


def check_path(argument: str, value: Any) -> None:
    """Raise ArgumentError unless `value` is the path of something, as text or a Path."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ArgumentError(argument, value, "must be a path.")


def set_field(instance: object, field: str, value: object) -> None:
    """Set a field of a frozen dataclass from its own `__post_init__`, which may convert a value once."""
    object.__setattr__(instance, field, value)


def check_fields(instance: object, check: Callable[[str, Any], object], *fields: str) -> None:
    """Convert fields of a frozen dataclass by one of the checks here, from its own `__post_init__`."""
    for field in fields:
        set_field(instance, field, check(field, getattr(instance, field)))


def parse_count(argument: str, amount: str | float) -> int:
    """Multiply-adds or parameters, at least 1: 390M, 1G, 1.5G, 1e9, or a plain number; B is a billion.

    A fraction is rounded down: it is a limit.
    """
    return int(_parse(argument, amount, COUNTS, "390M, 1G, 1.5G or 1e9", least=1))


def parse_bytes(argument: str, amount: str | float) -> int:
    """Bytes, at least 1: 100MB and 8GB are decimal, 100MiB and 8GiB binary; text needs a unit, a number counts bytes.

    Capitals do not matter, but a small b behind a capital is a bit: 100Mb is refused.
    """
    units = BYTES if isinstance(amount, str) else PLAIN
    return int(_parse(argument, amount, units, "100MB (10^8), 100MiB, 8GB or 8GiB", least=1))


def parse_seconds(argument: str, amount: str | float) -> float:
    """Seconds: 20ms, 0.02s, 500us; text needs a unit, a number counts seconds."""
    return float(_parse(argument, amount, SECONDS if isinstance(amount, str) else PLAIN, "20ms, 0.02s or 500us"))


def write_amount(value: float, units: Mapping[str, int | Decimal]) -> str:
    """The shortest exact text of an amount in these units, which its parser reads back: 1G, 390M, 8GB, 20ms."""
    exact = Decimal(str(value))
    return min((f"{(exact / factor).normalize():f}{unit}" for unit, factor in units.items()), key=len)


def write_count(count: int, noun: str, verb: Literal["", "are", "have"] = "") -> str:
    """So many of them: 1 image, 2,000 images; 1 image is, 2,000 images are."""
    written = f"{count:,} {noun}{'' if count == 1 else 's'}"
    return f"{written} {SINGULAR[verb] if count == 1 else verb}".rstrip()


def _integer(argument: str, value: SupportsIndex, least: int, rule: str) -> int:
    if not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            if (number := operator.index(value)) > LARGEST_WHOLE:
                rule = "must be at most 2^63 - 1."
            elif number >= least:
                return number
    raise ArgumentError(argument, value, rule)


def _parse(
    argument: str, amount: str | float, units: Mapping[str, int | Decimal], forms: str, least: int = 0
) -> Decimal:
    """The exact amount: .29G is 290,000,000 and not one less."""
    rule = f"must be an amount such as {forms}."
    if isinstance(amount, bool) or not isinstance(amount, (str, Real)):
        raise ArgumentError(argument, amount, rule)
    text = str(amount).strip().replace("µ", "u").replace("μ", "u")
    found = AMOUNT.fullmatch(text)
    if found is None:
        point = text.replace(",", ".")
        raise ArgumentError(argument, amount, rule + (f" Did you mean {point}?" if AMOUNT.fullmatch(point) else ""))
    digits, written = found.groups()
    known = {unit.lower(): unit for unit in units}
    bits = written.endswith("b") and not written.islower() and units is BYTES
    if bits or written.lower() not in known:
        near = _nearest(written.lower(), known)
        why = " A small b is a bit." if bits else ""
        raise ArgumentError(argument, amount, rule + why + (f" Did you mean {digits}{near}?" if near else ""))
    number = Decimal(digits.replace(",", "").replace("_", "")) * units[known[written.lower()]]
    if not least <= number <= LARGEST or number == 0:
        raise ArgumentError(argument, amount, f"must be {'at least 1' if least else 'above 0'} and at most 10^15.")
    return number


def _nearest(written: str, known: Mapping[str, str]) -> str:
    """The unit that was meant: exact but for capitals, or one that begins alike, as in 10M bytes, 1GB parameters."""
    if not written:
        return next((unit for unit in ("MB", "ms") if unit in known.values()), "")
    alike = (unit for low, unit in known.items() if low == written)
    longer = (unit for low, unit in known.items() if low.startswith(written))
    shorter = (unit for low, unit in known.items() if low and written.startswith(low) and len(written) - len(low) < 3)
    return next(iter((*alike, *longer, *shorter)), "")
