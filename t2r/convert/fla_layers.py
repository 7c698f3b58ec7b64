"""The layers of flash-linear-attention (fla) that a mixer of ours computes, option by option.
https://github.com/fla-org/flash-linear-attention, fla/layers/{gsa,gla,abc}.py and fla/models, read at version 0.6.0.

fla's model classes pass on fewer options than the layers have; what they leave out keeps the layer's default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from t2r.errors import InputError

G_NORM_EPS = 1e-5  # of fla's GSA layer, which does not hand norm_eps on to the kernel that norms
ROPE_THETA = 10000.0  # of fla's ABC layer


@dataclass(frozen=True)
class Layer:
    """One layer of fla's and the mixer that computes the same.

    Attributes:
        architecture: fla's class, as in config.json.
        names: our parameter -> theirs, beside the projections q, k, v and o.
        defaults: what fla's configuration class puts where config.json leaves a field out.
        fixed: fields without a counterpart of ours -> the values they may have; the first is written.
        wide: may have heads of another width than hidden_size / num_heads.
        mixer: our options from fla's fields.
        fields: fla's fields from a student's configuration and options.
        unlike: why fla cannot express a student with these options, or None.
    """

    architecture: str
    names: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, tuple[Any, ...]]
    wide: bool
    mixer: Callable[[Mapping[str, Any]], dict[str, Any]]
    fields: Callable[[PreTrainedConfig, Mapping[str, Any]], dict[str, Any]] = field(repr=False)
    unlike: Callable[[PreTrainedConfig, Mapping[str, Any]], str | None] = field(repr=False)


_DEFAULTS = {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4, "norm_eps": 1e-6}
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "use_short_conv": (False,),
    "elementwise_affine": (True,),
    "attn": (None,),
    "attnres_block_size": (None,),
}


def _read_gsa(raw: Mapping[str, Any]) -> dict[str, Any]:
    eps = None if raw["norm_eps"] == G_NORM_EPS else G_NORM_EPS
    slots = raw["hidden_size"] // raw["num_heads"] if raw["num_slots"] is None else raw["num_slots"]
    return {"name": "gsa", "style": "paper", "slots": slots, "tau": raw["gate_logit_normalizer"], "norm_eps": eps}


def _write_gsa(config: PreTrainedConfig, mixer: Mapping[str, Any]) -> dict[str, Any]:
    tau = mixer["tau"]
    return {
        "num_kv_heads": config.num_key_value_heads,
        "num_slots": mixer["slots"],
        "gate_logit_normalizer": int(tau) if tau == int(tau) else tau,
        "use_norm": True,
        "use_output_gate": False,
    }


def _unlike_gsa(config: PreTrainedConfig, mixer: Mapping[str, Any]) -> str | None:
    if mixer["style"] != "paper":
        return "fla's GSA is mixer gsa, style paper"
    if (config.rms_norm_eps if mixer["norm_eps"] is None else mixer["norm_eps"]) != G_NORM_EPS:
        own = f"norm_eps is {mixer['norm_eps']}, rms_norm_eps {config.rms_norm_eps}"
        return f"{own}; fla's GSA layer has {G_NORM_EPS} in its g_norm"
    return None


def _write_gla(config: PreTrainedConfig, mixer: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_kv_heads": config.num_key_value_heads}


def _unlike_gla(config: PreTrainedConfig, mixer: Mapping[str, Any]) -> str | None:
    if mixer["gate"] != "low-rank":
        return "fla's GLA is mixer gla, gate low-rank"
    if (mixer["rank"], mixer["tau"]) != (16, 16):
        return f"rank is {mixer['rank']} and tau {mixer['tau']}; fla's GLA model has 16 for both"
    return None


def _read_abc(raw: Mapping[str, Any]) -> dict[str, Any]:
    low, high = raw["clamp_min"], raw["clamp_max"]
    if not isinstance(high, int | float) or low != -high:
        raise InputError(f"clamp_min is {low!r} and clamp_max {high!r}; must be a number and its negative")
    slots = raw["num_slots"]
    if slots is None:
        slots = int(raw["hidden_size"] * raw["expand_k"] / raw["num_heads"])
    return {"name": "abc", "slots": slots, "clamp": high, "output_gate": True}


def _write_abc(config: PreTrainedConfig, mixer: Mapping[str, Any]) -> dict[str, Any]:
    clamp = mixer["clamp"]
    clamp = int(clamp) if clamp == int(clamp) else clamp
    return {"num_slots": mixer["slots"], "clamp_min": -clamp, "clamp_max": clamp}


def _unlike_abc(config: PreTrainedConfig, mixer: Mapping[str, Any]) -> str | None:
    if not mixer["output_gate"] or mixer["clamp"] is None:
        return "fla's ABC is mixer abc with output_gate and a clamp"
    if config.num_key_value_heads != config.num_attention_heads:
        return f"num_key_value_heads is {config.num_key_value_heads}; fla's ABC model has no grouped queries"
    rope = config.rope_parameters or {}
    if (rope.get("rope_type", "default"), rope.get("rope_theta")) != ("default", ROPE_THETA):
        return f"rope_parameters are {rope}; fla's ABC layer has rope_theta {ROPE_THETA}"
    return None


LAYERS: dict[str, Layer] = {
    "gsa": Layer(
        architecture="GSAForCausalLM",
        names={"gate_proj.weight": "f_proj.weight", "g_norm.weight": "g_norm.weight"},
        defaults={**_DEFAULTS, "num_slots": 64, "gate_logit_normalizer": 8, "expand_k": 1, "expand_v": 1},
        fixed={**_FIXED, "feature_map": ("swish",), "expand_k": (1,), "expand_v": (1,)},
        wide=False,
        mixer=_read_gsa,
        fields=_write_gsa,
        unlike=_unlike_gsa,
    ),
    "gla": Layer(
        architecture="GLAForCausalLM",
        names={
            "gk_proj.0.weight": "gk_proj.0.weight",
            "gk_proj.1.weight": "gk_proj.1.weight",
            "gk_proj.1.bias": "gk_proj.1.bias",
            "g_norm.weight": "g_norm.weight",
        },
        defaults={**_DEFAULTS, "expand_k": 0.5, "expand_v": 1.0, "feature_map": None, "use_output_gate": True},
        fixed={
            **_FIXED,
            "feature_map": ("relu",),
            "use_output_gate": (False,),
            "clamp_min": (None,),
            "use_gk": (True,),
            "use_gv": (False,),
            "gate_low_rank_dim": (16,),
            "gate_logit_normalizer": (16,),
        },
        wide=True,
        mixer=lambda raw: {"name": "gla", "gate": "low-rank"},
        fields=_write_gla,
        unlike=_unlike_gla,
    ),
    "abc": Layer(
        architecture="ABCForCausalLM",
        names={
            "gate_proj.weight": "s_proj.weight",
            "g_proj.weight": "g_proj.weight",
            "g_norm.weight": "g_norm.weight",
        },
        defaults={
            **_DEFAULTS,
            "num_slots": 64,
            "expand_k": 0.5,
            "expand_v": 1,
            "clamp_min": -32,
            "clamp_max": 32,
        },
        fixed={
            **_FIXED,
            "use_rope": (True,),
            "use_output_gate": (True,),
            "use_input_gate": (False,),
            "num_kv_heads": (None,),
        },
        wide=True,
        mixer=_read_abc,
        fields=_write_abc,
        unlike=_unlike_abc,
    ),
}
