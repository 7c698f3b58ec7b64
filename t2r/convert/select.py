"""Which layers keep softmax attention, and how many slots each of the others gets: decided by measuring what each
choice costs, KL(teacher || student) on text before any training."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from t2r.convert.calibrate import Probe, Score
from t2r.convert.swap import Entry
from t2r.errors import InputError
from t2r.model.mixers import MixerOptions, assign_mixers, parse_options

Told = Callable[[str], None]
Placed = dict[int, int]  # slots by layer
SMALLEST = 16  # slots
_WORTH = 1e-3  # moving slots must lower the KL by this fraction


class LayerScore(NamedTuple):
    """What one layer is worth: the KL when it alone is converted, and when it alone is not."""

    layer: int
    alone: float
    kept: float


def rank(probe: Probe, entries: Sequence[Entry]) -> list[LayerScore]:
    """Every converted layer of `entries`, the one most worth keeping first: whose return to softmax lowers the KL of
    the converted student most."""
    scores = []
    for layer, entry in enumerate(entries):
        if entry is not None:
            alone: list[Entry] = [None] * len(entries)
            alone[layer] = entry
            scores.append(LayerScore(layer, probe.score(alone).kl, probe.score(without(entries, [layer])).kl))
    return sorted(scores, key=lambda score: score.kept)


def keep_layers(
    probe: Probe, entries: Sequence[Entry], keep: int, *, method: str = "greedy", tell: Told = print
) -> list[int]:
    """The layers to keep as softmax, ascending.

    Args:
        entries: the mixers of a student with every layer converted.
        keep: how many layers.
        method: kl: the first of `rank`, each judged on its own; greedy: the best one first, then the best beside it.

    Raises:
        InputError: `keep` is not below the number of converted layers.
    """
    candidates = check_keep(entries, keep)
    if method == "kl":
        return sorted(score.layer for score in rank(probe, entries)[:keep])
    kept: list[int] = []
    while len(kept) < keep:
        scores = {layer: probe.score(without(entries, [*kept, layer])) for layer in candidates if layer not in kept}
        best = min(scores, key=lambda layer: scores[layer].kl)
        kept.append(best)
        tell(f"layer {best} back to softmax: KL {scores[best].kl:.4f}, loss {scores[best].loss:.4f}")
    return sorted(kept)


def check_keep(entries: Sequence[Entry], keep: int) -> list[int]:
    """The converted layers, of which `keep` can stay softmax.

    Raises:
        InputError: `keep` is not below their number.
    """
    candidates = [layer for layer, entry in enumerate(entries) if entry is not None]
    if not 0 < keep < len(candidates):
        raise InputError(f"keep: {keep} layers, must be between 1 and {len(candidates) - 1}")
    return candidates


def without(entries: Sequence[Entry], layers: Sequence[int]) -> list[Entry]:
    """The same mixers, but softmax in these layers."""
    return [None if layer in layers else entry for layer, entry in enumerate(entries)]


def place_slots(probe: Probe, options: MixerOptions, *, slots: int, tell: Told = print) -> list[Entry]:
    """The mixer of each layer, None where `options` are not for it: slots per layer, each `slots` times a power of two,
    so that their mean is at most `slots` and the KL of the whole student small.

    Every layer starts with four times the mean, the most that any gets, and the layer whose halving costs least KL per
    slot saved is halved until the mean fits. From there, or from the same number everywhere where that is better, one
    layer at a time is doubled at the expense of those whose halving costs least, while that lowers the KL.

    Raises:
        InputError: a mixer without slots, or too few of them.
    """
    check_slots(options, slots)
    layers = [i for i, entry in enumerate(assign_mixers(options, probe.layers)) if entry is not None]
    budget, most = slots * len(layers), 4 * slots

    def score(placed: Placed) -> Score:
        return probe.score([with_slots(options, placed[i]) if i in placed else None for i in range(probe.layers)])

    def halving_cost(placed: Placed, i: int) -> float:
        """KL per slot saved; infinite where there is nothing to halve."""
        if placed[i] // 2 < SMALLEST:
            return math.inf
        return (score(placed | {i: placed[i] // 2}).kl - score(placed).kl) / (placed[i] - placed[i] // 2)

    def doubled(placed: Placed, layer: int, costs: dict[int, float]) -> Placed | None:
        """`layer` doubled and the cheapest others halved until the budget holds; None where they do not suffice."""
        changed = placed | {layer: placed[layer] * 2}
        for other in sorted((i for i in costs if costs[i] < math.inf), key=costs.__getitem__):
            if other != layer and sum(changed.values()) > budget:
                changed[other] //= 2
        return changed if changed[layer] <= most and sum(changed.values()) <= budget else None

    placed = dict.fromkeys(layers, most)
    costs = {i: halving_cost(placed, i) for i in layers}
    while sum(placed.values()) > budget:
        # Halving one layer hardly ever makes another's cheaper: a cost is measured anew only when it is the lowest.
        known: set[int] = set()
        while (cheapest := min(costs, key=costs.__getitem__)) not in known:
            costs[cheapest] = halving_cost(placed, cheapest)
            known.add(cheapest)
        placed = placed | {cheapest: placed[cheapest] // 2}
        costs[cheapest] = halving_cost(placed, cheapest)
        tell(_told(placed, score(placed)))
    placed = min(placed, dict.fromkeys(layers, slots), key=lambda choice: score(choice).kl)
    while True:
        costs = {i: halving_cost(placed, i) for i in layers}
        moves = [move for i in layers if (move := doubled(placed, i, costs)) is not None]
        best = min(moves, key=lambda move: score(move).kl, default=placed)
        if score(best).kl >= score(placed).kl * (1 - _WORTH):
            return [with_slots(options, placed[i]) if i in placed else None for i in range(probe.layers)]
        placed = best
        tell(_told(placed, score(placed)))


def check_slots(options: MixerOptions, slots: int) -> None:
    """
    Raises:
        InputError: a mixer without slots, or too few of them.
    """
    if not hasattr(options, "slots"):
        raise InputError(f"slots: mixer {options.name} has none to place")
    if slots < SMALLEST:
        raise InputError(f"slots: a mean of {slots}, must be at least {SMALLEST}")


def with_slots(options: MixerOptions, slots: int | Sequence[int]) -> dict[str, Any]:
    """One layer's entry of a mixer with another number of slots, or one for each key/value head; a ring keeps its share
    of those beside the sinks."""
    stored = options.stored()
    if not isinstance(slots, int):
        if len(set(slots)) > 1:
            return parse_options(stored | {"slots": list(slots), "ring": None}).stored()
        slots = slots[0]
    if stored.get("ring"):
        share = stored["ring"] / (stored["slots"] - stored["sinks"])
        stored["ring"] = round(share * (slots - stored["sinks"]))
    return parse_options(stored | {"slots": slots}).stored()


def grouped(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A recipe's `mixer`: equal entries once, with the layers they are for; layers that keep softmax are in none."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for layer, entry in enumerate(entries):
        if entry is not None:
            groups.setdefault(repr(sorted(entry.items())), (entry, []))[1].append(layer)
    return [{**entry, "layers": ",".join(map(str, layers))} for entry, layers in groups.values()]


def _told(placed: Placed, score: Score) -> str:
    slots = " ".join(str(placed[layer]) for layer in sorted(placed))
    return f"slots {slots} (sum {sum(placed.values())}): KL {score.kl:.4f}, loss {score.loss:.4f}"
