"""GSA checkpoints of flash-linear-attention (fla), such as fla-hub/gsa-7B-mistral-100B: read as style `paper`, written
from it. https://github.com/fla-org/flash-linear-attention, fla/layers/gsa.py and fla/models/gsa.

The parameters are the same under other names, so both directions copy bytes. fla's g_norm has eps 1e-5 whatever the
configuration's norm_eps says; ours follows rms_norm_eps, so the two must agree.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import MistralConfig, PreTrainedConfig

from t2r.convert.headers import StoredTensor
from t2r.convert.hosts import build_config
from t2r.convert.source import Checkpoint
from t2r.errors import InputError
from t2r.model.mixers import MixerOptions, parse_options

MODEL_TYPE = "gsa"
G_NORM_EPS = 1e-5
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
    "self_attn.gate_proj.weight": ("attn.f_proj.weight",),
    "self_attn.g_norm.weight": ("attn.g_norm.weight",),
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
# what the student has no counterpart of: fla's field -> the values it may have
_FIXED: dict[str, tuple[Any, ...]] = {
    "feature_map": ("swish",),
    "hidden_act": ("swish", "silu"),
    "use_short_conv": (False,),
    "expand_k": (1, 1.0),
    "expand_v": (1, 1.0),
    "elementwise_affine": (True,),
    "attn": (None,),
    "attnres_block_size": (None,),
}


def is_fla(checkpoint: Checkpoint) -> bool:
    """True for a GSA checkpoint in fla's format."""
    return checkpoint.config.get("model_type") == MODEL_TYPE


def read_config(checkpoint: Checkpoint) -> tuple[PreTrainedConfig, MixerOptions]:
    """The Mistral configuration and the mixer that an fla GSA configuration amounts to.

    Raises:
        InputError: a field that the student has no counterpart of.
    """
    raw, path = checkpoint.config, checkpoint.folder / "config.json"
    for key, allowed in _FIXED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise InputError(f"{path}: {key} is {raw[key]!r}; GSA checkpoints of fla are read with {allowed[0]!r} only")
    eps = raw.get("norm_eps", 1e-6)
    if eps != G_NORM_EPS:
        raise InputError(f"{path}: norm_eps is {eps!r}, expected {G_NORM_EPS}, which fla's g_norm uses in any case")
    fields = {ours: raw[theirs] for theirs, ours in _FIELDS.items() if raw.get(theirs) is not None}
    if raw.get("num_kv_heads") is None:
        fields["num_key_value_heads"] = raw.get("num_heads")
    if raw.get("intermediate_size") is None and isinstance(raw.get("hidden_size"), int):
        # as fla derives it: two thirds of hidden_ratio x hidden_size, rounded up to a multiple of 256
        fields["intermediate_size"] = -(-int(raw["hidden_size"] * (raw.get("hidden_ratio") or 4) * 2 / 3) // 256) * 256
    fields |= {"hidden_act": "silu", "sliding_window": None}
    config = build_config(MistralConfig, fields, checkpoint)
    mixer = {"name": "gsa", "style": "paper", "slots": raw.get("num_slots"), "tau": raw.get("gate_logit_normalizer", 8)}
    mixer["slots"] = config.head_dim if mixer["slots"] is None else mixer["slots"]
    try:
        return config, parse_options(mixer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_tensors(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same checkpoint with its tensors under the student's names; what has none keeps its own."""
    left = dict(checkpoint.tensors)
    found: dict[str, StoredTensor] = {}
    for name, candidates in _all_names(layers).items():
        theirs = next((candidate for candidate in candidates if candidate in left), None)
        if theirs is not None:
            found[name] = left.pop(theirs)
    for layer in range(layers):
        _split_gate(found, f"model.layers.{layer}.mlp.")
    return replace(checkpoint, tensors=found | left)


def write_config(config: PreTrainedConfig, path: Path) -> dict[str, Any]:
    """The content of fla's config.json for a student.

    Raises:
        InputError: a student that fla's GSA model cannot express.
    """
    mixers = config.mixers
    if any(m is None or (m["name"], m.get("style")) != ("gsa", "paper") for m in mixers):
        raise InputError(f"{path}: fla's GSA model needs mixer gsa, style paper, in every layer")
    if any(m != mixers[0] for m in mixers):
        raise InputError(f"{path}: fla's GSA model needs the same slots and tau in every layer")
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        raise InputError(f"{path}: fla's GSA model needs head_dim = hidden_size / num_attention_heads")
    if config.rms_norm_eps != G_NORM_EPS:
        raise InputError(f"{path}: rms_norm_eps is {config.rms_norm_eps}, fla's GSA layer has {G_NORM_EPS} in g_norm")
    if config.hidden_act != "silu":
        raise InputError(f"{path}: hidden_act is {config.hidden_act!r}, fla's GSA model needs silu")
    tau = mixers[0]["tau"]
    return {
        "architectures": ["GSAForCausalLM"],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "num_slots": mixers[0]["slots"],
        "gate_logit_normalizer": int(tau) if tau == int(tau) else tau,
        **{key: allowed[0] for key, allowed in _FIXED.items()},
        "use_norm": True,
        "use_output_gate": False,
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype else None,
    }


def fla_name(name: str) -> str | None:
    """fla's name of a student's tensor, or None where it has none."""
    match = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
    if match:
        return match[1] + _LAYER_NAMES[match[2]][0] if match[2] in _LAYER_NAMES else None
    return _NAMES[name][0] if name in _NAMES else None


def _all_names(layers: int) -> dict[str, tuple[str, ...]]:
    names = dict(_NAMES)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        names |= {prefix + ours: tuple(prefix + t for t in theirs) for ours, theirs in _LAYER_NAMES.items()}
    return names


def _split_gate(tensors: dict[str, StoredTensor], prefix: str) -> None:
    """Before 2025 fla kept gate_proj and up_proj in one tensor, gate first: read it as two."""
    both = tensors.get(prefix + "gate_proj.weight")
    if both is None or prefix + "up_proj.weight" in tensors or len(both.shape) != 2 or both.shape[0] % 2:
        return
    half = replace(both, shape=(both.shape[0] // 2, both.shape[1]), nbytes=both.nbytes // 2)
    tensors[prefix + "gate_proj.weight"] = half
    tensors[prefix + "up_proj.weight"] = replace(half, offset=half.offset + half.nbytes)
