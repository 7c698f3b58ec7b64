"""HGRN2 (Qin et al., arXiv 2404.07904): gated linear attention whose key is what the gate forgets."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import MixerOptions, RMSNorm, Rotary, States
from t2r.model.mixers.recurrence import LinearRecurrence, silence
from t2r.model.sequence import SequenceInfo


class HGRN2Options(MixerOptions):
    """Options of `hgrn2`: none."""

    name: Literal["hgrn2"] = "hgrn2"


class HGRN2Mixer(LinearRecurrence):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, o_t = swish(q_t) S_t, RMSNorm over all heads.

    The host's k becomes the forget gate: f = l + (1 - l) sigmoid(k). The lower bound l = layer / layers stays where the
    paper's learned bounds start.
    """

    options_class: ClassVar[type[MixerOptions]] = HGRN2Options
    gate = "key"

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: HGRN2Options, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        self.g_norm = RMSNorm(self.query_heads * self.head_dim, eps=config.rms_norm_eps)
        self.lower_bound = layer_idx / config.num_hidden_layers

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The norm's weight 1."""
        return {"g_norm.weight": torch.ones(self.query_heads * self.head_dim, device="cpu")}

    def inputs(
        self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, info: SequenceInfo
    ) -> States:
        """q, k = 1 - f, v and log f [B, T, H, D]."""
        free = 1.0 - self.lower_bound
        write = free * torch.sigmoid(-k.float())  # 1 - f
        log_forget = torch.log1p(-write) if self.lower_bound else F.logsigmoid(k.float())
        return F.silu(q), silence(info, write.to(k.dtype)), v, silence(info, log_forget)

    def finish(self, o: Tensor) -> Tensor:
        """As `RecurrentMixer.finish`."""
        return self.g_norm(o.flatten(2))
