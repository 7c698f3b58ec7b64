"""Floating-point operations that a training step needs, counted from the model's own modules.

Per token, with a product of an [n, m] matrix counted as 2 n m:

    forward    2 per weight of every linear layer, the head included and the embedding not, plus the mixing
    backward   2 per weight for the gradient of its input, 2 per *trained* weight for its own, twice the mixing
    teacher    its forward pass (distill: with the head; align: without)

    mixing     of a recurrent layer 2 S (1 + HQ / H): every number of its S-number state is written once and read once
               by each query head of its group. GSA: S = 2 H M D, so 4 M D (H + HQ).
               of a softmax layer 2 HQ D L, causal over documents of L tokens (queries times keys, and times values).

Align runs only the mixers, and of their projections only o_proj hands a gradient on. What gradient checkpointing
computes twice is not counted, nor norms, activations, softmax and the optimiser: so MFU compares with other people's.
"""

import math
from typing import Any

from torch import nn

from t2r.model.mixers import Mixer
from t2r.recipe import AlignStage, Stage


def training_flops(student: Any, teacher: Any, stage: Stage, document: float) -> dict[str, float]:
    """FLOPs per token of training: "student" (forward and backward), "teacher" (0 without one) and "total".

    Args:
        student: as `make_trainable` leaves it: its parameters say what is trained.
        teacher: the host's model, or None.
        document: mean tokens of a document, which softmax layers look back over.
    """
    align = isinstance(stage, AlignStage)
    layers = list(student.get_base_model().model.layers if hasattr(student, "peft_config") else student.model.layers)
    mixers = [layer.self_attn for layer in layers]
    parts = [mixer for mixer in mixers if isinstance(mixer, Mixer)] if align else [student]
    total = sum(_weights(part) for part in parts)
    trained = sum(_weights(part, trained=True) for part in parts)
    handed_on = sum(_weights(part.o_proj) for part in parts) if align else total
    mixing = sum(_mixing(mixer, document) for mixer in mixers if isinstance(mixer, Mixer) or not align)
    own = 2.0 * (total + handed_on + trained) + 3.0 * mixing
    its = 0.0
    if teacher is not None:
        its = 2.0 * (_weights(teacher) - (_weights(teacher.lm_head) if align else 0))
        its += sum(_mixing(layer.self_attn, document) for layer in teacher.model.layers)
    return {"student": own, "teacher": its, "total": own + its}


def _weights(module: nn.Module, *, trained: bool = False) -> int:
    found = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
    return sum(weight.numel() for weight in found if weight.requires_grad or not trained)


def _mixing(attention: Any, document: float) -> float:
    """FLOPs per token of a forward pass, outside the projections."""
    config = attention.config
    if not isinstance(attention, Mixer):
        return 2.0 * config.num_attention_heads * attention.head_dim * document
    state = sum(math.prod(shape) for shape in type(attention).state_shapes(config, attention.options))
    return 2.0 * state * (1 + config.num_attention_heads / config.num_key_value_heads)
