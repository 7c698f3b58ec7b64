"""Write many numbered names as one line: layers 0-30 instead of thirty-one rows."""

import re
from collections.abc import Iterable, Sequence

_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")


def fold_numbers(numbers: Iterable[int]) -> str:
    """Numbers as ranges: [0, 1, 2, 5] -> "0-2,5"."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def fold_layers(rows: Sequence[tuple[str, tuple]]) -> list[tuple[str, int, tuple]]:
    """Fold (name, rest) rows that differ in the layer number alone into (name with a range, count, rest)."""
    groups: dict[tuple[str, tuple], list[int]] = {}
    for name, rest in rows:
        match = _LAYER.search(name)
        groups.setdefault((_LAYER.sub("{}", name), rest), []).append(int(match[0]) if match else -1)
    folded = []
    for (name, rest), layers in groups.items():
        folded.append((name.replace("{}", fold_numbers(layers)), len(layers), rest))
    return folded
