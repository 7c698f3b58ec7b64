"""What a student is made of, from its configuration alone."""

from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedConfig

from t2r.model.mixers import MIXERS, Mixer, parse_options
from t2r.model.mixers.base import head_shape, model_dtype


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """Mixers, parameters and memory of a student (or of a host, whose layers are all softmax).

    Returns:
        {"model_type", "layers": [a mixer's name with its style, or "softmax (host)", per layer],
        "parameters": {"embedding", "attention" (projections and q/k norms), "mixer" (new with the mixers), "mlp",
        "norm", "head" (0 when tied), "total"}, "state_bytes": per sequence, mixers' states alone,
        "kv_bytes_per_token": of the layers that keep the host's attention,
        "teacher_kv_bytes_per_token": of the host with all its attention, in the configuration's dtype}.
    """
    entries = getattr(config, "mixers", None) or [None] * config.num_hidden_layers
    _, heads, dim = head_shape(config)
    per_layer = 2 * heads * dim * model_dtype(config).itemsize
    names, state_bytes = [], 0
    for entry in entries:
        if entry is None:
            names.append("softmax (host)")
            continue
        options = parse_options(entry)
        kind = MIXERS[options.name]
        names.append(" ".join([options.name, *([options.style] if hasattr(options, "style") else [])]))
        state_bytes += kind.state_bytes(config, options)
    return {
        "model_type": config.model_type,
        "layers": names,
        "parameters": count_parameters(config),
        "state_bytes": state_bytes,
        "kv_bytes_per_token": per_layer * entries.count(None),
        "teacher_kv_bytes_per_token": per_layer * len(entries),
    }


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters by kind, counted on a model without memory (the meta device)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    new = {id(p) for m in model.modules() if isinstance(m, Mixer) for p in m.new_parameters().values()}
    counts: Counter[str] = Counter(dict.fromkeys(["embedding", "attention", "mixer", "mlp", "norm", "head"], 0))
    for name, parameter in model.named_parameters():  # a tied head is listed once, with the embedding
        counts["mixer" if id(parameter) in new else _kind(name)] += parameter.numel()
    return {**counts, "total": counts.total()}


def _kind(name: str) -> str:
    parts = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "mlp": "mlp"}
    return next((kind for part, kind in parts.items() if f".{part}." in f".{name}"), "norm")
