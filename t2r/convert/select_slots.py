"""How many slots each key/value head gets: decided by what every one loses alone with so many, before any training."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from t2r.convert.head_costs import head_costs
from t2r.convert.swap import Entry
from t2r.errors import InputError
from t2r.model.mixers import MixerOptions, assign_mixers, parse_options

Key = TypeVar("Key", bound=Hashable)
SMALLEST = 16  # slots
FAR_SHARE = 1 / 3  # of a cost is the KL on far repeats, which are some 7% of a text


def place_slots(
    teacher: Any,
    windows: Tensor,
    options: MixerOptions,
    *,
    slots: int,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> list[Entry]:
    """The mixer of each layer, None where `options` are not for it, with `slots` on average in a key/value head.

    A head with n slots starts as attention over n tokens. What that costs is estimated head by head, with everything
    else the teacher's, and slots are shared out so that these costs sum to the least. Each alone, because heads that
    all see little lose much that training brings back, and what a head can no longer reach it does not: judged together
    and untrained, the short heads would be given the slots that the far one needs. For the same reason far repeats
    count for more than their share of the text.

    Args:
        teacher: a host's language model on its device.
        windows: ids [N, T + 1]; no head gets T slots or more.
        seed, advance: as in `head_costs`.

    Raises:
        InputError: a mixer whose heads cannot differ, or too few slots or tokens.
    """
    check_slots(options, slots)
    entries = assign_mixers(options, len(teacher.model.layers))
    layers = [layer for layer, entry in enumerate(entries) if entry is not None]
    stored = options.stored()
    length = windows.shape[1] - 1
    sizes = [size for size in ladder(16 * slots) if stored["sinks"] < size < length]
    if not sizes or sizes[0] > slots:
        raise InputError(
            f"slots: a mean of {slots} with {stored['sinks']} sinks, {length} tokens: nothing to share out"
        )
    costs = head_costs(
        teacher, windows, layers, sinks=stored["sinks"], sizes=sizes, far_share=FAR_SHARE, seed=seed, advance=advance
    )
    heads = {
        (layer, head): curve
        for layer, curves in zip(layers, costs.tolist(), strict=True)
        for head, curve in enumerate(curves)
    }
    placed = share_out(heads, sizes, slots * len(heads))
    for layer in layers:
        each = [placed[layer, head] for head in range(costs.shape[1])]
        same = len(set(each)) == 1
        entries[layer] = parse_options(stored | {"slots": each[0] if same else each, "ring": None}).stored()
    return entries


def in_words(entries: Sequence[Entry]) -> str:
    """One line: the slots of every layer, or softmax."""
    numbers = ("softmax" if entry is None else str(entry["slots"]) for entry in entries)
    return f"slots by layer: {'  '.join(numbers)}"


def check_slots(options: MixerOptions, slots: int) -> None:
    """
    Raises:
        InputError: a mixer without slots or whose heads cannot differ, or too few slots.
    """
    if not hasattr(options, "slots"):
        raise InputError(f"slots: mixer {options.name} has none to place")
    if slots < SMALLEST:
        raise InputError(f"slots: a mean of {slots}, must be at least {SMALLEST}")
    if not can_place(options):
        raise InputError("slots: only gsa of style transfer without long-lived slots can have them by head")


def can_place(options: MixerOptions) -> bool:
    """Whether heads can differ and n slots start as attention over n tokens, by which they are placed."""
    stored: dict[str, Any] = options.stored()
    ring = stored.get("ring")
    return stored.get("style") == "transfer" and (ring is None or stored["sinks"] + ring == stored["slots"])


def ladder(most: int) -> list[int]:
    """SMALLEST times 1, 1.5, 2, 3, 4, 6, ... up to `most`."""
    steps = (half << power for power in range(most.bit_length()) for half in (SMALLEST, 3 * SMALLEST // 2))
    return [size for size in steps if size <= most]


def share_out(costs: Mapping[Key, Sequence[float]], sizes: Sequence[int], budget: int) -> dict[Key, int]:
    """A size for each key of `costs`, which holds its cost at each of the `sizes`: those whose sum is at most `budget`
    and whose costs sum to the least (a knapsack, by dynamic programming)."""
    unit = math.gcd(*sizes)
    least = np.zeros(budget // unit + 1)  # costs of the keys so far, by what is left for them
    choices = []
    for curve in costs.values():
        sums = np.full((len(sizes), len(least)), np.inf)
        for row, size, cost in zip(sums, sizes, curve, strict=True):
            row[size // unit :] = least[: max(0, len(least) - size // unit)] + cost
        choices.append(sums.argmin(0))
        least = sums.min(0)
    left, shared = len(least) - 1, {}
    for key, choice in zip(reversed(list(costs)), reversed(choices), strict=True):
        shared[key] = sizes[choice[left]]
        left -= shared[key] // unit
    return shared
