"""The students' configurations: the host's own plus one field, `mixers`."""

from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from t2r.errors import InputError
from t2r.model.mixers import parse_options, stored_entry

PREFIX = "t2r_"
# of a configuration's dictionary, what says where it came from and not what the model is
_PROVENANCE = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "mixers")


class T2RMistralConfig(MistralConfig):
    """A Mistral whose attention is replaced layer by layer.

    Attributes:
        mixers: one entry per layer: None where the host's attention stays, else the mixer's options with "name".
    """

    model_type = "t2r_mistral"
    mixers: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_mixers(self)


class T2RLlamaConfig(LlamaConfig):
    """A Llama whose attention is replaced layer by layer; `mixers` as in T2RMistralConfig."""

    model_type = "t2r_llama"
    mixers: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_mixers(self)


class T2RQwen2Config(Qwen2Config):
    """A Qwen2 whose attention is replaced layer by layer; `mixers` as in T2RMistralConfig."""

    model_type = "t2r_qwen2"
    mixers: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_mixers(self)


class T2RQwen3Config(Qwen3Config):
    """A Qwen3 whose attention is replaced layer by layer; `mixers` as in T2RMistralConfig."""

    model_type = "t2r_qwen3"
    mixers: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_mixers(self)


STUDENT_CONFIGS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedConfig]]] = {
    "mistral": (MistralConfig, T2RMistralConfig),
    "llama": (LlamaConfig, T2RLlamaConfig),
    "qwen2": (Qwen2Config, T2RQwen2Config),
    "qwen3": (Qwen3Config, T2RQwen3Config),
}


def check_mixers(config: Any) -> None:
    """Bring `config.mixers` into its full form: one checked entry per layer.

    Raises:
        InputError: not one entry per layer, or an entry that is no mixer's options.
    """
    entries = [None] * config.num_hidden_layers if config.mixers is None else config.mixers
    if len(entries) != config.num_hidden_layers:
        raise InputError(f"config mixers: {len(entries)} entries, must be one per layer ({config.num_hidden_layers})")
    for entry in entries:
        if entry is not None and not isinstance(entry, dict):
            raise InputError(f"config mixers: entry {entry!r} must be null or a mapping with a name")
    config.mixers = [None if entry is None else stored_entry(parse_options(entry)) for entry in entries]


def student_config(host: PreTrainedConfig, mixers: list[dict[str, Any] | None]) -> PreTrainedConfig:
    """The configuration of a student of `host`, one entry of `mixers` per layer.

    Raises:
        InputError: an architecture without a student, a shape that no attention can have, or bad `mixers`.
    """
    if host.model_type not in STUDENT_CONFIGS:
        raise InputError(f"config model_type: {host.model_type!r} is none of {', '.join(STUDENT_CONFIGS)}")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if not isinstance(getattr(host, name), int) or getattr(host, name) < 1:
            raise InputError(f"config {name}: {getattr(host, name)!r} must be a positive integer")
    if host.num_attention_heads % host.num_key_value_heads:
        raise InputError(
            f"config num_attention_heads: {host.num_attention_heads} is not a multiple of num_key_value_heads "
            f"({host.num_key_value_heads})"
        )
    return STUDENT_CONFIGS[host.model_type][1](**_own_fields(host), mixers=mixers)  # type: ignore[call-arg]


def host_config(student: PreTrainedConfig) -> PreTrainedConfig:
    """The plain configuration of a student's host."""
    return STUDENT_CONFIGS[student.model_type.removeprefix(PREFIX)][0](**_own_fields(student))


def _own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _PROVENANCE}
