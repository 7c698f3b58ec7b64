"""The configuration of a teacher that t2r bench builds with random weights."""

from pathlib import Path
from typing import Any

from t2r.errors import InputError

# The published configuration of mistralai/Mistral-7B-v0.1, its window left out: longer contexts are timed too.
MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
}


def host(name: str, layers: int | None) -> Any:
    """The teacher's configuration.

    Args:
        name: "mistral-7b", or a folder with a teacher's config.json.
        layers: keep only the first so many; None for all.

    Raises:
        InputError: neither, no architecture that has a student, or all of mistral-7b without a GPU.
    """
    import torch
    from transformers import AutoConfig

    from t2r.model.configuration import STUDENT_CONFIGS

    if name == "mistral-7b":
        if layers is None and not torch.cuda.is_available():
            raise InputError("--config mistral-7b needs a GPU, and torch sees none; pass --layers N for a part of it")
        config = AutoConfig.for_model(**MISTRAL_7B)
    elif (Path(name) / "config.json").is_file():
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    else:
        raise InputError(f"--config {name}: neither mistral-7b nor a folder with a config.json")
    if config.model_type not in STUDENT_CONFIGS:
        raise InputError(f"--config {name}: model_type {config.model_type!r} is none of {', '.join(STUDENT_CONFIGS)}")
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def mixer(text: str) -> dict[str, Any]:
    """A recipe's mixer from "gsa", "gsa:slots=128,style=paper" or "gsa:slots=[32,96]".

    Raises:
        InputError: a part that is no key=value.
    """
    import re

    import yaml

    name, _, options = text.partition(":")
    parts = [part.partition("=") for part in re.split(r",(?![^\[]*\])", options) if part]
    if wrong := [key for key, equals, _ in parts if not equals]:
        raise InputError(f"--mixer {text}: {wrong[0]!r} is no key=value")
    return {"name": name, **{key: yaml.safe_load(value) for key, _, value in parts}}
