"""Counts of tokens as people write them: 100M, 1.5B, 500k, 2_000_000."""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", re.IGNORECASE)


def parse_count(value: Any) -> Any:
    """A whole number from `value`: an int, a whole float such as 1e6, or text such as "100M".

    Returns anything else unchanged, for the schema to refuse by its type.

    Raises:
        ValueError: text that is no count, or a count that is not whole.
    """
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip().replace("_", ""))
        if not match:
            raise ValueError(f"{value!r} is no count; write 500000, 500k, 100M, 1.5B")
        number = Decimal(match[1]) * _SUFFIXES[match[2].lower()]
        if number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return int(number)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def format_count(number: int) -> str:
    """The shortest text that `parse_count` reads back as `number`: 100000000 -> "100M", 524288 -> "524288"."""
    for suffix in ("T", "B", "M", "k"):
        size = _SUFFIXES[suffix.lower()]
        for step in (size, size // 10):
            if number >= size and number % step == 0:
                return f"{Decimal(number) / size:f}{suffix}"
    return str(number)


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
