"""Retention (Sun et al., arXiv 2307.08621): linear attention with rotary positions and one fixed decay per head."""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import MixerOptions, Rotary, States, rotate
from t2r.model.mixers.recurrence import LinearRecurrence, retention, silence
from t2r.model.sequence import SequenceInfo


class RetNetOptions(MixerOptions):
    """Options of `retnet`: none."""

    name: Literal["retnet"] = "retnet"


class RetNetMixer(LinearRecurrence):
    """S_t = gamma_h S_{t-1} + k_t v_t^T with gamma_h = 1 - 2^(-5-h) per key/value head, and RMSNorm per query head
    without weights in the place of group norm. No new parameters, as in the T2R experiments of arXiv 2409.07146; the
    decay belongs to the state, so the query heads of a group share it."""

    options_class: ClassVar[type[MixerOptions]] = RetNetOptions
    gate = "scalar"

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: Any, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        self.scale = self.scaling

    def inputs(
        self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, info: SequenceInfo
    ) -> States:
        """q, k, v and log alpha [B, T, H]."""
        q, k = rotate(q, k, rotary)
        log_decay = retention(self.heads, k.device).expand(k.shape[:3])
        return q, silence(info, k), v, silence(info, log_decay)

    def finish(self, o: Tensor) -> Tensor:
        """As `RecurrentMixer.finish`."""
        return F.rms_norm(o, o.shape[-1:], eps=self.config.rms_norm_eps).flatten(2)
