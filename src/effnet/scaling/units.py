"""Amounts as people write them: 1G multiply-adds, 10M parameters, 100MB, 8GiB, 20ms."""

from __future__ import annotations

import math
import re

from effnet.errors import ArgumentError

COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
BYTES = {"b": 1} | {
    f"{prefix}{kind}b": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for kind, base in (("", 1000), ("i", 1024))
}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

AMOUNT = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_count(argument: str, amount: str | float) -> int:
    """A number of multiply-adds or parameters: 390M, 1G, 1.5G, 1e9, or a plain number. B is a billion, too.

    Raises:
        ArgumentError: it is no positive amount.
    """
    return math.floor(_parse(argument, amount, COUNTS, "must be an amount such as 390M, 1G, 1.5G or 1e9."))


def parse_bytes(argument: str, amount: str | float) -> int:
    """Bytes: 100MB and 8GB are decimal, 100MiB and 8GiB binary; a plain number is bytes if it is not written.

    Raises:
        ArgumentError: it is no positive amount.
    """
    rule = "must be an amount of bytes such as 100MB (10^8), 100MiB, 8GB or 8GiB."
    return math.floor(_parse(argument, amount, BYTES if isinstance(amount, str) else {"": 1}, rule))


def parse_seconds(argument: str, amount: str | float) -> float:
    """Seconds: 20ms, 0.02s, 500us; a plain number is seconds if it is not written.

    Raises:
        ArgumentError: it is no positive amount, or it is written without a unit.
    """
    units = SECONDS if isinstance(amount, str) else {"": 1.0}
    return _parse(argument, amount, units, "must be a time such as 20ms, 0.02s or 500us.")


def _parse(argument: str, amount: str | float, units: dict[str, int] | dict[str, float], rule: str) -> float:
    if isinstance(amount, bool) or not isinstance(amount, (str, int, float)):
        raise ArgumentError(argument, amount, rule)
    found = AMOUNT.fullmatch(str(amount))
    unit = found[2].lower() if found else ""
    if found is None or unit not in units:
        near = next((name for name in units if unit and name.startswith(unit)), "")
        hint = f" Did you mean {found[1]}{near.upper().replace('I', 'i')}?" if found and near else ""
        raise ArgumentError(argument, amount, rule + hint)
    number = float(found[1].replace(",", "").replace("_", "")) * units[unit]
    if not (number > 0 and math.isfinite(number)):
        raise ArgumentError(argument, amount, f"must be more than nothing and finite: it {rule.removeprefix('must ')}")
    return number
