"""The students: the hosts' own classes with mixers in the place of attention."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
    initialization,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from t2r.model.cache import StudentCache, softmax_kind
from t2r.model.configuration import T2RLlamaConfig, T2RMistralConfig, T2RQwen2Config, T2RQwen3Config
from t2r.model.decoding import RecordedStep, can_record
from t2r.model.mixers import MIXERS, Mixer, layer_generator, parse_options
from t2r.model.sequence import SequenceInfo

_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class StudentPreTrained:
    """What the base model and the language model of a student share."""

    _is_stateful = True  # assisted decoding would have to roll the state back

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        # transformers passes over custom modules whose own parameters are all loaded, and so over a mixer that has
        # none but its children's; `_init_weights` below needs no such protection
        super()._initialize_weights(module)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, Mixer):
            return super()._init_weights(module)  # type: ignore[misc]
        values = module.initial_values(layer_generator(torch.initial_seed(), module.layer_idx))
        for name, value in values.items():
            initialization.copy_(module.get_parameter(name), value)  # leaves loaded parameters alone
        return None


class StudentModel(StudentPreTrained):
    """A host's base model; stands before the host's class in the bases."""

    def post_init(self: Any) -> None:
        """Put the mixers in. The host's constructor calls this last, when its layers stand and nothing is drawn."""
        for index, (layer, entry) in enumerate(zip(self.layers, self.config.mixers, strict=True)):
            if entry is not None:
                options = parse_options(entry)
                layer.self_attn = MIXERS[options.name](layer.self_attn, self.config, options, index)
        super().post_init()  # type: ignore[misc]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StudentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the host's forward; packed documents as `SequenceInfo.build` says, by `cu_seq_lens_q` or `position_ids`.

        Raises:
            ValueError: arguments that contradict each other, or a cache that is no StudentCache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, StudentCache):
            raise ValueError(f"past_key_values: {type(past_key_values).__name__}, must be a t2r.model.StudentCache")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden_states.shape[:2]
        info = SequenceInfo.build(
            batch,
            length,
            hidden_states.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=kwargs.get("cu_seq_lens_q"),
            seen=None if past_key_values is None else past_key_values.tokens_seen(batch, hidden_states.device),
        )
        if use_cache and past_key_values is None and info.cu_seqlens is None:
            past_key_values = StudentCache(self.config)
        if position_ids is None:
            position_ids = info.position  # unlike the hosts' default it leaves padding out, as `generate` does
        kinds = [
            softmax_kind(self.config, index) if entry is None else "" for index, entry in enumerate(self.config.mixers)
        ]
        masks: dict[str, Any] = {"": info}
        for kind in set(kinds) - {""}:
            masks[kind] = _MASKS[kind](
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        rotary = self.rotary_emb(hidden_states, position_ids)
        for layer, kind in zip(self.layers, kinds, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        if past_key_values is not None:
            past_key_values.advance(info)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class StudentForCausalLM(StudentPreTrained):
    """A host's language model; stands before the host's class in the bases and has its forward, loss and head."""

    base_model_class: ClassVar[Any]

    def __init__(self: Any, config: Any) -> None:
        # not the host's constructor, which would build the host's base model first
        PreTrainedModel.__init__(self, config)
        self.model = self.base_model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation {generation_config.cache_implementation!r}: a student has its own cache; "
                    "leave it unset"
                )
            model_kwargs["past_key_values"] = StudentCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _valid_auto_compile_criteria(self: Any, model_kwargs: dict, generation_config: Any) -> bool:
        # where `generate` would compile a model with a static cache, it records a student's decoding step instead
        wants_more = generation_config.output_attentions or generation_config.output_hidden_states
        allowed = not (generation_config.disable_compile or wants_more)
        return allowed and can_record(self, model_kwargs.get("past_key_values"))

    def get_compiled_call(self: Any, compile_config: Any = None) -> RecordedStep:
        """For `generate`: the decoding step of one generation, as a CUDA graph."""
        return RecordedStep(self)


class T2RMistralModel(StudentModel, MistralModel):
    """Base model of a Mistral student."""

    config: T2RMistralConfig
    config_class = T2RMistralConfig


class T2RMistralForCausalLM(StudentForCausalLM, MistralForCausalLM):
    """Language model of a Mistral student."""

    config: T2RMistralConfig
    config_class = T2RMistralConfig
    base_model_class = T2RMistralModel


class T2RLlamaModel(StudentModel, LlamaModel):
    """Base model of a Llama student."""

    config: T2RLlamaConfig
    config_class = T2RLlamaConfig


class T2RLlamaForCausalLM(StudentForCausalLM, LlamaForCausalLM):
    """Language model of a Llama student."""

    config: T2RLlamaConfig
    config_class = T2RLlamaConfig
    base_model_class = T2RLlamaModel


class T2RQwen2Model(StudentModel, Qwen2Model):
    """Base model of a Qwen2 student."""

    config: T2RQwen2Config
    config_class = T2RQwen2Config


class T2RQwen2ForCausalLM(StudentForCausalLM, Qwen2ForCausalLM):
    """Language model of a Qwen2 student."""

    config: T2RQwen2Config
    config_class = T2RQwen2Config
    base_model_class = T2RQwen2Model


class T2RQwen3Model(StudentModel, Qwen3Model):
    """Base model of a Qwen3 student."""

    config: T2RQwen3Config
    config_class = T2RQwen3Config


class T2RQwen3ForCausalLM(StudentForCausalLM, Qwen3ForCausalLM):
    """Language model of a Qwen3 student."""

    config: T2RQwen3Config
    config_class = T2RQwen3Config
    base_model_class = T2RQwen3Model
