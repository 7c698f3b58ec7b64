"""What a stage minimises. An objective is installed as the student's forward, so that every wrapper (autocast, DDP,
FSDP, peft) sees one ordinary forward pass that returns a loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2r.errors import InputError
from t2r.model.mixers import Mixer
from t2r.model.sequence import SequenceInfo
from t2r.recipe import AlignStage, DistillStage, FinetuneStage
from t2r.train.losses import IGNORE, ChunkLoss, cross_entropy, head_loss, kl_divergence, top_k_kl_divergence

Batch = dict[str, Tensor]
_PLACE = ("input_ids", "position_ids", "cu_seq_lens_q")


class Objective:
    """Base: next-token cross-entropy, for validation in every stage.

    Losses are means over the counted tokens of a batch: those with a label.
    """

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """What the teacher contributes, computed outside the student's forward and passed into it."""
        return {}

    def loss(self, student: Any, batch: Batch, **prepared: Any) -> Tensor:
        """Mean loss of a batch; scalar fp32."""
        raise NotImplementedError

    @contextmanager
    def installed(self, student: Any) -> Iterator[None]:
        """Make `student(**batch, **prepared)` return the stage's loss, or with `validation=True` the summed
        cross-entropy."""

        def forward(model: Any, validation: bool = False, **inputs: Any) -> Tensor:
            batch = {name: inputs.pop(name) for name in (*_PLACE, "labels")}
            prepared = {name: inputs[name] for name in ("targets",) if inputs.get(name) is not None}
            if validation:
                return token_loss(model, batch)
            return self.loss(model, batch, **prepared)

        student.forward = MethodType(forward, student)
        try:
            yield
        finally:
            del student.forward


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """The last hidden states of a causal language model, [B*T, hidden]."""
    inputs = {name: batch[name] for name in _PLACE}
    device = batch["input_ids"].device.type
    if torch.is_autocast_enabled(device):
        # autocast passes over embeddings: float32 ones would keep the whole residual stream in float32
        embedded = model.model.embed_tokens(inputs.pop("input_ids"))
        inputs["inputs_embeds"] = embedded.to(torch.get_autocast_dtype(device))
    return model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def token_loss(student: Any, batch: Batch) -> Tensor:
    """Summed next-token cross-entropy of a batch, in nats."""
    labels = batch["labels"].flatten()
    return _head_loss(student, hidden_states(student, batch), lambda logits, at: cross_entropy(logits, labels[at]))


def _head_loss(student: Any, hidden: Tensor, loss: ChunkLoss) -> Tensor:
    """`head_loss` as a forward pass of the student's head, so that FSDP gathers its weight."""
    head = student.lm_head
    head.forward = MethodType(lambda module, x: head_loss(x, module.weight, loss), head)
    try:
        return head(hidden)
    finally:
        del head.forward


def count(batch: Batch) -> Tensor:
    """How many tokens of a batch have a label."""
    return (batch["labels"] != IGNORE).sum()


class Finetune(Objective):
    """Next-token cross-entropy on the text."""

    def loss(self, student: Any, batch: Batch, **prepared: Any) -> Tensor:
        return token_loss(student, batch) / count(batch).clamp(min=1)


class Distill(Objective):
    """KL(teacher || student) on the logits, plus `ce_weight` times the cross-entropy on the text."""

    def __init__(self, stage: DistillStage, teacher: Any) -> None:
        self.stage = stage
        self.teacher = teacher

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Any]:
        """The teacher's last hidden states; its logits are made chunk by chunk beside the student's."""
        return {"targets": hidden_states(self.teacher, batch)}

    def loss(self, student: Any, batch: Batch, **prepared: Any) -> Tensor:
        labels, targets = batch["labels"].flatten(), prepared["targets"]
        mask = labels != IGNORE
        head, stage = self.teacher.lm_head.weight, self.stage

        def chunk_loss(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                teacher = (targets[part].to(head.dtype) @ head.T).float()
            if stage.teacher_top_k is None:
                loss = kl_divergence(logits, teacher, mask[part], temperature=stage.temperature)
            else:
                loss = top_k_kl_divergence(
                    logits, teacher, mask[part], k=stage.teacher_top_k, temperature=stage.temperature
                )
            return loss + stage.ce_weight * cross_entropy(logits, labels[part]) if stage.ce_weight else loss

        return _head_loss(student, hidden_states(student, batch), chunk_loss) / count(batch).clamp(min=1)


class Align(Objective):
    """Per converted layer, the squared error of the mixer's output against the teacher attention's, on the teacher's
    own input to that layer, over the mean square of that attention's output; the mean over layers.

    A layer that gives zeros scores 1, a perfect one 0. The layers do not see each other: each has its own regression,
    as in LoLCATs (arXiv 2410.10254) with outputs in place of attention matrices.
    """

    def __init__(self, stage: AlignStage, teacher: Any) -> None:
        self.stage = stage
        self.teacher = teacher

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Any]:
        """(hidden states, rotary embeddings, attention output) of every teacher layer."""
        seen: list[tuple[Tensor, Any, Tensor]] = []

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.append((kwargs["hidden_states"], kwargs["position_embeddings"], output[0]))

        handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in self.teacher.model.layers]
        try:
            hidden_states(self.teacher, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {"targets": seen}

    def loss(self, student: Any, batch: Batch, **prepared: Any) -> Tensor:
        info = SequenceInfo(batch["position_ids"], None, batch["cu_seq_lens_q"])
        errors = []
        for layer, (hidden, rotary, target) in zip(student.model.layers, prepared["targets"], strict=True):
            mixer = layer.self_attn
            if isinstance(mixer, Mixer):
                if not torch.is_autocast_enabled(hidden.device.type):
                    dtype = mixer.o_proj.weight.dtype
                    hidden, rotary = hidden.to(dtype), tuple(x.to(dtype) for x in rotary)
                output = self._run(mixer, hidden, rotary, info)
                errors.append((output.float() - target.float()).square().sum() / target.float().square().sum())
        return torch.stack(errors).mean()

    def _run(self, mixer: nn.Module, hidden: Tensor, rotary: Any, info: SequenceInfo) -> Tensor:
        if not self.stage.gradient_checkpointing:
            return mixer(hidden_states=hidden, position_embeddings=rotary, attention_mask=info)[0]
        # Not the reentrant kind: it gives no gradient at all when, as here, no input requires one.
        return checkpoint(
            lambda: mixer(hidden_states=hidden, position_embeddings=rotary, attention_mask=info)[0],
            use_reentrant=False,
        )


def make_objective(stage: AlignStage | DistillStage | FinetuneStage, teacher: Any) -> Objective:
    """The objective of a stage; `teacher` may be None for a finetune stage.

    Raises:
        InputError: `teacher_top_k` is not below the vocabulary's size.
    """
    if isinstance(stage, FinetuneStage):
        return Finetune()
    if isinstance(stage, DistillStage) and (stage.teacher_top_k or 0) >= teacher.config.vocab_size:
        raise InputError(
            f"teacher_top_k: {stage.teacher_top_k} must be below the vocabulary of {teacher.config.vocab_size}; "
            "leave it out to compare all"
        )
    return Align(stage, teacher) if isinstance(stage, AlignStage) else Distill(stage, teacher)
