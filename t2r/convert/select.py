"""Which layers keep softmax attention: decided by measuring what each choice costs, KL(teacher || student) on text
before any training."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from t2r.convert.calibrate import Probe
from t2r.convert.swap import Entry
from t2r.errors import InputError

Told = Callable[[str], None]


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


def grouped(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A recipe's `mixer`: equal entries once, with the layers they are for; layers that keep softmax are in none."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for layer, entry in enumerate(entries):
        if entry is not None:
            groups.setdefault(repr(sorted(entry.items())), (entry, []))[1].append(layer)
    return [{**entry, "layers": ",".join(map(str, layers))} for entry, layers in groups.values()]
