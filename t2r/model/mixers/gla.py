"""Gated Linear Attention (Yang et al., arXiv 2312.06635)."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import MixerOptions, RMSNorm, Rotary, States
from t2r.model.mixers.recurrence import LinearRecurrence, silence
from t2r.model.sequence import SequenceInfo


class GLAOptions(MixerOptions):
    """Options of `gla`."""

    name: Literal["gla"] = "gla"
    gate: Literal["low-rank", "pooled"] = Field("low-rank", description="a learned gate, or one made from k alone")
    rank: int = Field(16, ge=1, le=4096, description="of the low-rank gate")
    tau: float = Field(16.0, gt=0.0, description="divisor of the logarithm of the gate")


class GLAMixer(LinearRecurrence):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t, without positions.

    low-rank: alpha = sigmoid(W2 W1 x + b)^(1/tau), ReLU on q and k, the host's scale and RMSNorm per head, no output
    gate: the T2R form of arXiv 2409.07146. gk_proj and g_norm correspond to fla's layer.

    pooled: no new parameters. alpha = sigmoid(k)^(1/tau), softmax over the features of q and k, and what is written is
    weighted by 1 - alpha, so that S stays a weighted mean and needs no norm. A gate taken from k follows Liger
    (arXiv 2503.01496).
    """

    options_class: ClassVar[type[MixerOptions]] = GLAOptions
    gate = "key"

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: GLAOptions, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        if options.gate == "low-rank":
            self.gk_proj = nn.Sequential(
                nn.Linear(config.hidden_size, options.rank, bias=False),
                nn.Linear(options.rank, self.heads * self.head_dim),
            )
            self.g_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.scale = self.scaling

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The projections normal, the gate's bias 0, the norm's weight 1."""
        if self.options.gate == "pooled":
            return {}
        rank, width, std = self.options.rank, self.heads * self.head_dim, self.config.initializer_range
        down = torch.empty(rank, self.config.hidden_size, device="cpu").normal_(std=std, generator=generator)
        up = torch.empty(width, rank, device="cpu").normal_(std=std, generator=generator)
        return {
            "gk_proj.0.weight": down,
            "gk_proj.1.weight": up,
            "gk_proj.1.bias": torch.zeros(width, device="cpu"),
            "g_norm.weight": torch.ones(self.head_dim, device="cpu"),
        }

    def inputs(
        self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, info: SequenceInfo
    ) -> States:
        """q, k, v and log alpha [B, T, H, D]."""
        if self.options.gate == "low-rank":
            gate = self.gk_proj(hidden_states).unflatten(-1, (self.heads, -1))
            q, k = F.relu(q), F.relu(k)
            log_decay = F.logsigmoid(gate.float()) / self.options.tau
        else:
            log_decay = F.logsigmoid(k.float()) / self.options.tau
            q, k = q.softmax(-1), k.softmax(-1) * -torch.expm1(log_decay).to(k.dtype)
        return q, silence(info, k), v, silence(info, log_decay)

    def finish(self, o: Tensor) -> Tensor:
        """As `RecurrentMixer.finish`."""
        return (self.g_norm(o) if self.options.gate == "low-rank" else o).flatten(2)
