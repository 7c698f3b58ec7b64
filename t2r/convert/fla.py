"""GSA, GLA and ABC checkpoints of flash-linear-attention (fla), such as fla-hub/gsa-7B-mistral-100B: read as the mixer
that computes the same (t2r.convert.fla_layers), and written from it.

The parameters are the same under other names, so both directions copy bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import MistralConfig, PreTrainedConfig

from t2r.convert.fla_layers import LAYERS, Layer
from t2r.convert.headers import StoredTensor
from t2r.convert.hosts import build_config
from t2r.convert.source import Checkpoint
from t2r.errors import InputError
from t2r.model.mixers import MixerOptions, parse_options

MODEL_TYPES = tuple(LAYERS)
# student's name -> fla's names for it, today's first; before 2025 the norms could lie inside attn and mlp
_NAMES: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("model.embeddings.weight",),
    "model.norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
_LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("attn_norm.weight", "attn.norm.weight"),
    "self_attn.q_proj.weight": ("attn.q_proj.weight",),
    "self_attn.k_proj.weight": ("attn.k_proj.weight",),
    "self_attn.v_proj.weight": ("attn.v_proj.weight",),
    "self_attn.o_proj.weight": ("attn.o_proj.weight",),
    "post_attention_layernorm.weight": ("mlp_norm.weight", "mlp.norm.weight"),
    "mlp.gate_proj.weight": ("mlp.gate_proj.weight",),
    "mlp.up_proj.weight": ("mlp.up_proj.weight",),
    "mlp.down_proj.weight": ("mlp.down_proj.weight",),
}
# configuration fields of one meaning: fla's -> ours
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "use_cache": "use_cache",
}


def is_fla(checkpoint: Checkpoint) -> bool:
    """True for a checkpoint in fla's format, of a model that can be read."""
    return checkpoint.config.get("model_type") in MODEL_TYPES


def read_config(checkpoint: Checkpoint) -> tuple[PreTrainedConfig, MixerOptions]:
    """The Mistral configuration and the mixer that an fla configuration amounts to.

    Raises:
        InputError: a field that the student has no counterpart of.
    """
    path, kind = checkpoint.folder / "config.json", str(checkpoint.config["model_type"])
    layer = LAYERS[kind]
    raw = layer.defaults | checkpoint.config
    for key, allowed in layer.fixed.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise InputError(f"{path}: {key} is {raw[key]!r}; fla's {kind} models are read with {allowed[0]!r} only")
    fields = {ours: raw[theirs] for theirs, ours in _FIELDS.items() if raw.get(theirs) is not None}
    if raw.get("num_kv_heads") is None:
        fields["num_key_value_heads"] = raw["num_heads"]
    if raw.get("intermediate_size") is None and isinstance(raw["hidden_size"], int):
        # as fla derives it: two thirds of hidden_ratio x hidden_size, rounded up to a multiple of 256
        fields["intermediate_size"] = -(-int(raw["hidden_size"] * (raw.get("hidden_ratio") or 4) * 2 / 3) // 256) * 256
    fields |= {"hidden_act": "silu", "sliding_window": None}
    if layer.wide:
        fields["head_dim"] = _head_dim(raw, path)
    config = build_config(MistralConfig, fields, checkpoint)
    try:
        return config, parse_options(layer.mixer(raw))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _head_dim(raw: Mapping[str, Any], path: Path) -> int:
    expand = raw["expand_k"]
    if raw["expand_v"] != expand:
        raise InputError(
            f"{path}: expand_k is {expand!r} and expand_v {raw['expand_v']!r}; the student has one head_dim"
        )
    try:
        width = raw["hidden_size"] * expand / raw["num_heads"]
    except (TypeError, ArithmeticError):
        width = 0
    if width != int(width) or width < 1:
        raise InputError(f"{path}: hidden_size x expand_k / num_heads is {width}, expected a positive integer")
    return int(width)


def read_tensors(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same checkpoint with its tensors under the student's names; what has none keeps its own."""
    left = dict(checkpoint.tensors)
    found: dict[str, StoredTensor] = {}
    for name, candidates in _all_names(layers, LAYERS[str(checkpoint.config["model_type"])]).items():
        theirs = next((candidate for candidate in candidates if candidate in left), None)
        if theirs is not None:
            found[name] = left.pop(theirs)
    for layer in range(layers):
        _split_gate(found, f"model.layers.{layer}.mlp.")
    return replace(checkpoint, tensors=found | left)


def write_config(config: PreTrainedConfig, path: Path) -> dict[str, Any]:
    """The content of fla's config.json for a student.

    Raises:
        InputError: a student that none of fla's models can express.
    """
    mixer = config.mixers[0]
    if mixer is None or mixer["name"] not in LAYERS or any(m != mixer for m in config.mixers):
        raise InputError(f"{path}: fla's models need one mixer, gsa (style paper), gla or abc, alike in every layer")
    kind = mixer["name"]
    layer = LAYERS[kind]
    if reason := layer.unlike(config, mixer):
        raise InputError(f"{path}: {reason}")
    expand = config.num_attention_heads * config.head_dim / config.hidden_size
    if expand != 1 and not layer.wide:
        raise InputError(f"{path}: fla's {kind} model needs head_dim = hidden_size / num_attention_heads")
    if config.hidden_act != "silu":
        raise InputError(f"{path}: hidden_act is {config.hidden_act!r}, fla's {kind} model needs silu")
    expand = int(expand) if expand == int(expand) else expand
    return {
        "architectures": [layer.architecture],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items() if theirs != "num_kv_heads"},
        "expand_k": expand,
        "expand_v": expand,
        **{key: allowed[0] for key, allowed in layer.fixed.items()},
        **layer.fields(config, mixer),
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype else None,
    }


def fla_name(name: str, model_type: str) -> str | None:
    """fla's name of a student's tensor in its model of that type, or None where it has none."""
    match = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
    names = _layer_names(LAYERS[model_type]) if match else _NAMES
    prefix, own = (match[1], match[2]) if match else ("", name)
    return prefix + names[own][0] if own in names else None


def _layer_names(layer: Layer) -> dict[str, tuple[str, ...]]:
    return _LAYER_NAMES | {f"self_attn.{ours}": (f"attn.{theirs}",) for ours, theirs in layer.names.items()}


def _all_names(layers: int, layer: Layer) -> dict[str, tuple[str, ...]]:
    names = dict(_NAMES)
    for index in range(layers):
        prefix = f"model.layers.{index}."
        names |= {prefix + ours: tuple(prefix + t for t in theirs) for ours, theirs in _layer_names(layer).items()}
    return names


def _split_gate(tensors: dict[str, StoredTensor], prefix: str) -> None:
    """Before 2025 fla kept gate_proj and up_proj in one tensor, gate first: read it as two."""
    both = tensors.get(prefix + "gate_proj.weight")
    if both is None or prefix + "up_proj.weight" in tensors or len(both.shape) != 2 or both.shape[0] % 2:
        return
    half = replace(both, shape=(both.shape[0] // 2, both.shape[1]), nbytes=both.nbytes // 2)
    tensors[prefix + "gate_proj.weight"] = half
    tensors[prefix + "up_proj.weight"] = replace(half, offset=half.offset + half.nbytes)
