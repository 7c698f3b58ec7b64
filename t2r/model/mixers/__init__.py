"""The mixers by name, and how a recipe's options become one entry per layer.

To add a mixer: one file with its options and its class, one entry in MIXERS, one row in the tests' table.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, ValidationError

from t2r.errors import InputError
from t2r.model.mixers.abc import ABCMixer
from t2r.model.mixers.base import Mixer, MixerOptions, layer_generator, nearest
from t2r.model.mixers.gla import GLAMixer
from t2r.model.mixers.gsa import GSAMixer
from t2r.model.mixers.hgrn2 import HGRN2Mixer
from t2r.model.mixers.hybrid import HybridMixer
from t2r.model.mixers.linear import LinearMixer
from t2r.model.mixers.mamba2 import Mamba2Mixer
from t2r.model.mixers.retnet import RetNetMixer
from t2r.model.mixers.softmax import SoftmaxMixer, SoftmaxOptions

MIXERS: dict[str, type[Mixer]] = {
    "gsa": GSAMixer,
    "softmax": SoftmaxMixer,
    "hybrid": HybridMixer,
    "gla": GLAMixer,
    "retnet": RetNetMixer,
    "hgrn2": HGRN2Mixer,
    "mamba2": Mamba2Mixer,
    "linear": LinearMixer,
    "abc": ABCMixer,
}

if TYPE_CHECKING:
    AnyMixerOptions = MixerOptions
else:
    AnyMixerOptions = Annotated[
        Union[tuple(kind.options_class for kind in MIXERS.values())],  # noqa: UP007
        Field(discriminator="name"),
    ]


def parse_options(options: Mapping[str, Any]) -> MixerOptions:
    """Typed options from a mapping with "name".

    Raises:
        InputError: an unknown name or key (with the nearest known one), or a value that breaks its rule.
    """
    name = options.get("name")
    if not isinstance(name, str) or name not in MIXERS:
        raise InputError(f"mixer name: {name!r} is none of {', '.join(MIXERS)}{nearest(str(name), list(MIXERS))}")
    known = MIXERS[name].options_class
    for key in options:
        if key not in known.model_fields:
            raise InputError(f"mixer {name}: unknown option {key!r}{nearest(str(key), list(known.model_fields))}")
    try:
        return known(**options)
    except ValidationError as error:
        raise InputError(f"mixer {name}: {'; '.join(_problem(e, options) for e in error.errors())}") from None


def _problem(found: Any, options: Mapping[str, Any]) -> str:
    """One of pydantic's errors: the option, the rule and the value; rules of our own name the value themselves."""
    where, node = [], options
    for part in found["loc"]:
        if isinstance(part, int) or (isinstance(node, Mapping) and part in node):  # else the tag of a union
            where.append(str(part))
            node = node[part]
    rule = found["msg"].removeprefix("Value error, ")
    if found["type"] != "value_error":
        rule += f", not {found['input']!r}"
    return f"{'.'.join(where)}: {rule}" if where else rule


def parse_layers(text: str, layers: int) -> list[int]:
    """Layer numbers from "all", "0,2,5-9" or "all except 2,5", ascending.

    Raises:
        InputError: anything else, or a layer outside 0 .. layers - 1.
    """
    match = re.fullmatch(r"\s*all\s*(?:except\s+(.+))?", text)
    if match:
        left_out = parse_layers(match[1], layers) if match[1] else []
        return [layer for layer in range(layers) if layer not in left_out]
    chosen: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not span:
            raise InputError(f'layers: {text!r} must be "all", "0,2,5-9" or "all except 2,5"')
        first, last = int(span[1]), int(span[2] or span[1])
        if not first <= last < layers:
            raise InputError(f"layers: {part.strip()!r} in {text!r} must lie in 0-{layers - 1}, the smaller first")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def assign_mixers(options: MixerOptions | Sequence[MixerOptions], layers: int) -> list[dict[str, Any] | None]:
    """One entry per layer: the options of its mixer, or None where the host's attention stays.

    Raises:
        InputError: two mixers claim the same layer.
    """
    entries: list[dict[str, Any] | None] = [None] * layers
    claimed: dict[int, str] = {}
    for one in [options] if isinstance(options, MixerOptions) else options:
        for layer in parse_layers(one.layers, layers):
            if layer in claimed:
                raise InputError(f"layers: layer {layer} is given to both {claimed[layer]} and {one.name}")
            claimed[layer] = one.name
            entries[layer] = stored_entry(one)
    return entries


def stored_entry(options: MixerOptions) -> dict[str, Any] | None:
    """What the configuration keeps for a layer with these options; softmax without a window is the host's own."""
    if isinstance(options, SoftmaxOptions) and options.window is None:
        return None
    return options.stored()


__all__ = [
    "MIXERS",
    "AnyMixerOptions",
    "Mixer",
    "MixerOptions",
    "assign_mixers",
    "layer_generator",
    "nearest",
    "parse_layers",
    "parse_options",
    "stored_entry",
]
