"""How many slots each layer or key/value head gets: decided by measuring every one alone, before any training."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from t2r.convert.calibrate import Probe, Score
from t2r.convert.select import Told, with_slots
from t2r.convert.swap import Entry
from t2r.errors import InputError
from t2r.model.mixers import MixerOptions, assign_mixers, parse_options
from t2r.model.mixers.base import head_shape

Key = TypeVar("Key", bound=Hashable)
SMALLEST = 16  # slots
FAR_SHARE = 1 / 3  # of a cost is the KL on far repeats, which are some 7% of a text


def place_slots(
    probe: Probe, options: MixerOptions, *, slots: int, by_head: bool = True, tell: Told = print
) -> list[Entry]:
    """The mixer of each layer, None where `options` are not for it, with `slots` on average in a layer or, with
    `by_head`, in a key/value head.

    What n slots cost is measured layer by layer or head by head, with everything else the teacher's, and slots are
    shared out so that the costs sum to the least. Each alone, because heads that all see little lose much that training
    brings back, and what a head can no longer reach it does not: judged together and untrained, the short heads would
    be given the slots that the far one needs. For the same reason far repeats count for more than their share of the
    text.

    Raises:
        InputError: a mixer without slots or whose heads cannot differ, or too few slots.
    """
    check_slots(options, slots, by_head=by_head)
    layers = [layer for layer, entry in enumerate(assign_mixers(options, probe.layers)) if entry is not None]
    _, heads, _ = head_shape(probe.teacher.config)
    parts: list[int | None] = [*range(heads)] if by_head else [None]
    sizes = [size for size in ladder((16 if _starts_as_window(options) else 4) * slots) if size < probe.window]

    def alone(layer: int, head: int | None, size: int) -> Score:
        entries: list[Entry] = [None] * probe.layers
        entries[layer] = _entry(
            options, size, None if head is None else [i == head for i in range(heads)], probe.window
        )
        return probe.score(entries)

    costs = {}
    for layer in layers:
        for head in parts:
            scores = [alone(layer, head, size) for size in sizes]
            costs[layer, head] = [(1 - FAR_SHARE) * score.kl + FAR_SHARE * score.far_kl for score in scores]
            each = (f"{size}: {score.kl:.4f}, {score.far_kl:.4f}" for size, score in zip(sizes, scores, strict=True))
            name = f"layer {layer}" if head is None else f"layer {layer}, head {head}"
            tell(f"{name} alone, slots: KL, on far repeats: {'; '.join(each)}")
    placed = share_out(costs, sizes, slots * len(costs))
    return [
        with_slots(options, [placed[layer, head] for head in parts]) if layer in layers else None
        for layer in range(probe.layers)
    ]


def in_words(entries: Sequence[Entry]) -> str:
    """One line: the slots of every layer, or softmax."""
    numbers = ("softmax" if entry is None else str(entry["slots"]) for entry in entries)
    return f"slots by layer: {'  '.join(numbers)}"


def check_slots(options: MixerOptions, slots: int, *, by_head: bool) -> None:
    """
    Raises:
        InputError: a mixer without slots or whose heads cannot differ, or too few slots.
    """
    if not hasattr(options, "slots"):
        raise InputError(f"slots: mixer {options.name} has none to place")
    if slots < SMALLEST:
        raise InputError(f"slots: a mean of {slots}, must be at least {SMALLEST}")
    if by_head and not _starts_as_window(options):
        raise InputError("slots: only gsa of style transfer without long-lived slots can have them by head")


def _starts_as_window(options: MixerOptions) -> bool:
    """Whether n slots start as attention over n tokens, which is measured in their place: it is exact and fast."""
    stored: dict[str, Any] = options.stored()
    ring = stored.get("ring")
    return stored.get("style") == "transfer" and (ring is None or stored["sinks"] + ring == stored["slots"])


def _entry(options: MixerOptions, size: int, which: list[bool] | None, everything: int) -> Entry:
    """A layer with `size` slots, or with so many in the heads `which` and the teacher's attention in the others."""
    if not _starts_as_window(options):
        return with_slots(options, size)
    sinks = options.stored()["sinks"]
    window = size - sinks if which is None else [size - sinks if one else everything for one in which]
    return parse_options({"name": "softmax", "sinks": sinks, "window": window}).stored()


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
