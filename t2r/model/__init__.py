"""The student model. Importing this module registers the student classes with transformers' Auto classes."""

from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from t2r.model.cache import RecurrentLayer, StudentCache
from t2r.model.configuration import STUDENT_CONFIGS, host_config, student_config
from t2r.model.describe import describe
from t2r.model.loading import load, load_tokenizer, locate, pick_device
from t2r.model.mixers import MIXERS, Mixer, MixerOptions, assign_mixers, layer_generator, parse_layers, parse_options
from t2r.model.modeling import (
    T2RLlamaForCausalLM,
    T2RMistralForCausalLM,
    T2RQwen2ForCausalLM,
    T2RQwen3ForCausalLM,
)
from t2r.model.sequence import SequenceInfo


class Host(NamedTuple):
    """A supported architecture and its student."""

    config: type[PreTrainedConfig]
    causal_lm: type[PreTrainedModel]
    student_config: type[PreTrainedConfig]
    student_causal_lm: Any


HOSTS: dict[str, Host] = {
    name: Host(STUDENT_CONFIGS[name][0], host, STUDENT_CONFIGS[name][1], student)
    for name, host, student in (
        ("mistral", MistralForCausalLM, T2RMistralForCausalLM),
        ("llama", LlamaForCausalLM, T2RLlamaForCausalLM),
        ("qwen2", Qwen2ForCausalLM, T2RQwen2ForCausalLM),
        ("qwen3", Qwen3ForCausalLM, T2RQwen3ForCausalLM),
    )
}

for _host in HOSTS.values():
    AutoConfig.register(_host.student_config.model_type, _host.student_config, exist_ok=True)
    AutoModel.register(_host.student_config, _host.student_causal_lm.base_model_class, exist_ok=True)
    AutoModelForCausalLM.register(_host.student_config, _host.student_causal_lm, exist_ok=True)

__all__ = [
    "HOSTS",
    "MIXERS",
    "Host",
    "Mixer",
    "MixerOptions",
    "RecurrentLayer",
    "SequenceInfo",
    "StudentCache",
    "assign_mixers",
    "describe",
    "host_config",
    "layer_generator",
    "load",
    "load_tokenizer",
    "locate",
    "parse_layers",
    "parse_options",
    "pick_device",
    "student_config",
]
