"""A student in memory that shares its teacher's weights, and whose layers change mixers at will. Nothing is written:
this is how conversions are tried before one is made."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from t2r.model import MIXERS, Mixer, layer_generator, parse_options, student_config

Entry = dict[str, Any] | None


class SwappedStudent:
    """The student of a teacher in memory.

    Args:
        teacher: a host's language model, as `t2r.model.load` gives it; it stays as it is and can be run beside.
        seed: of the mixers' new parameters; the values are those that `t2r convert` writes.

    Attributes:
        model: the student. Embeddings, norms, MLPs and projections are the teacher's own modules.
        entries: the mixer of each layer as the configuration has it; None where the teacher's attention stands.
    """

    def __init__(self, teacher: Any, *, seed: int = 0) -> None:
        layers = len(teacher.model.layers)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                student_config(teacher.config, [None] * layers), trust_remote_code=False
            )
        for name, module in teacher.model.named_children():
            if name != "layers":
                setattr(model.model, name, module)
        for own, theirs in zip(model.model.layers, teacher.model.layers, strict=True):
            for name, module in theirs.named_children():
                setattr(own, name, module)
        model.lm_head = teacher.lm_head
        self.model = model.eval()
        self.entries: list[Entry] = [None] * layers
        self._attentions: list[nn.Module] = [layer.self_attn for layer in teacher.model.layers]
        self._seed = seed

    def set(self, entries: Sequence[Entry]) -> Any:
        """Give every layer its mixer, None the teacher's attention; layers that have theirs keep it.

        Returns:
            The student.
        """
        for index, (entry, layer) in enumerate(zip(entries, self.model.model.layers, strict=True)):
            if entry != self.entries[index]:
                layer.self_attn = self._attentions[index] if entry is None else self.mixer(index, entry)
                self.model.config.mixers[index] = self.entries[index] = entry
        return self.model

    def mixer(self, layer: int, entry: dict[str, Any]) -> Mixer:
        """A mixer as it starts in that layer, on the teacher's device and in its dtype."""
        options = parse_options(entry)
        attention: Any = self._attentions[layer]
        weight = attention.o_proj.weight
        with torch.device("cpu"):
            mixer = MIXERS[options.name](attention, self.model.config, options, layer)
        values = mixer.initial_values(layer_generator(self._seed, layer))
        for name, parameter in mixer.new_parameters().items():
            parameter.data = values[name].reshape(parameter.shape).to(weight.device, weight.dtype)
        return mixer.requires_grad_(False).eval()
