"""The host's configuration, taken from config.json by an allow-list.

config.json may hold keys that make transformers import or download code (auto_map, attention and kernel
implementations, custom pipelines). So nothing is copied forward: a configuration is built from the fields that the
config class itself declares, and written from that object.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from t2r.convert.source import Checkpoint
from t2r.errors import InputError
from t2r.model import HOSTS

_LEGACY_KEYS = ("rope_theta", "rope_scaling")  # transformers 4 wrote these; the config classes still read them
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_host_config(checkpoint: Checkpoint) -> tuple[PreTrainedConfig, list[str]]:
    """The host's config object, and the keys of config.json that were left behind.

    Raises:
        InputError: an architecture that is not supported, a quantised checkpoint, or impossible sizes.
    """
    path = checkpoint.folder / "config.json"
    raw = checkpoint.config
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in HOSTS:
        hint = "; this one is converted already" if str(model_type).startswith("t2r_") else ""
        raise InputError(f"{path}: model_type {model_type!r} is not supported; supported are {', '.join(HOSTS)}{hint}")
    if raw.get("quantization_config") is not None:
        raise InputError(f"{path}: quantization_config: quantised checkpoints cannot be converted; use the original")
    config_class = HOSTS[model_type][0]
    return build_config(config_class, raw, checkpoint), ignored_keys(config_class, raw)


def build_config(
    config_class: type[PreTrainedConfig], raw: Mapping[str, Any], checkpoint: Checkpoint
) -> PreTrainedConfig:
    """A config object from the allowed keys of `raw`.

    Raises:
        InputError: sizes that are impossible, or not those of the weights.
    """
    path = checkpoint.folder / "config.json"
    _check_sizes(raw, path)
    # before the config classes lay out a list with an entry per layer
    if raw["num_hidden_layers"] != checkpoint.layers:
        raise InputError(
            f"{path}: num_hidden_layers is {raw['num_hidden_layers']}, the weights have {checkpoint.layers} layers"
        )
    fields = {key: value for key, value in raw.items() if key in allowed_keys(config_class)}
    try:
        return config_class(**fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        # transformers reports a bad field over several lines
        raise InputError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error


def allowed_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """The fields that a config class and its bases below PreTrainedConfig declare, and the older names of them."""
    own = [base for base in config_class.__mro__ if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig]
    return {key for base in own for key in inspect.get_annotations(base)} | set(_LEGACY_KEYS)


def ignored_keys(config_class: type[PreTrainedConfig], raw: Mapping[str, Any]) -> list[str]:
    """Keys of config.json that the student does not take over, apart from those that transformers writes itself."""
    written_anew = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype"}
    return sorted(set(raw) - allowed_keys(config_class) - written_anew)


def _check_sizes(raw: Mapping[str, Any], path: Path) -> None:
    for key in _REQUIRED:
        if raw.get(key) is None:
            raise InputError(f"{path}: {key} is missing")
    for key in _SIZES:
        value = raw.get(key)
        if value is None and key in (*_OPTIONAL_SIZES, "max_position_embeddings"):
            continue
        if type(value) is not int or value <= 0:
            raise InputError(f"{path}: {key} is {value!r}, expected a positive integer")
    heads, kv_heads, hidden = raw["num_attention_heads"], raw.get("num_key_value_heads"), raw["hidden_size"]
    if kv_heads and heads % kv_heads:
        raise InputError(f"{path}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise InputError(f"{path}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    head_dim = raw.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise InputError(f"{path}: head_dim is {head_dim}; rotary positions need an even one")
    positive = {key: raw.get(key, 1.0) for key in ("rms_norm_eps", "rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            raise InputError(f"{path}: {key} is {rope!r}, expected an object")
        positive |= {f"{key}.{name}": n for name, n in rope.items() if isinstance(n, int | float)}
    for key, value in positive.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise InputError(f"{path}: {key} is {value!r}, expected a positive finite number")
    dropout = raw.get("attention_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not (0 <= dropout < 1):
        raise InputError(f"{path}: attention_dropout is {dropout!r}, expected a number from 0 to below 1")
