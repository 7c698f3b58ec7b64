"""Mamba-2's state-space duality (Dao and Gu, arXiv 2405.21060), started from attention as in MambaInLlama
(Wang et al., arXiv 2408.15237): C from q, B from k, x from v."""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import MixerOptions, Rotary, States
from t2r.model.mixers.recurrence import LinearRecurrence, silence
from t2r.model.sequence import SequenceInfo


class Mamba2Options(MixerOptions):
    """Options of `mamba2`: none."""

    name: Literal["mamba2"] = "mamba2"


class Mamba2Mixer(LinearRecurrence):
    """S_t = exp(-exp(A) dt_t) S_{t-1} + dt_t k_t v_t^T, o_t = scale q_t S_t + D v_t, dt = softplus(W x + b).

    A, dt and S belong to a key/value head, D to a query head. No convolution, no output gate and no norm: attention
    has none of them.
    """

    options_class: ClassVar[type[MixerOptions]] = Mamba2Options
    gate = "scalar"
    writes = True

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: Mamba2Options, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        self.dt_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.query_heads))
        self.scale = self.scaling

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """As the paper's code: dt log-uniform in [0.001, 0.1] at x = 0, exp(A) uniform in [1, 16], D = 1."""
        std = self.config.initializer_range
        weight = torch.empty(self.heads, self.config.hidden_size, device="cpu").normal_(std=std, generator=generator)
        low, high = math.log(0.001), math.log(0.1)
        dt = torch.empty(self.heads, device="cpu").uniform_(low, high, generator=generator).exp()
        return {
            "dt_proj.weight": weight,
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),  # softplus of it is dt
            "A_log": torch.empty(self.heads, device="cpu").uniform_(1.0, 16.0, generator=generator).log(),
            "D": torch.ones(self.query_heads, device="cpu"),
        }

    def inputs(
        self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, info: SequenceInfo
    ) -> States:
        """q, k, v, log alpha [B, T, H] and dt [B, T, H]."""
        dt = F.softplus(self.dt_proj(hidden_states).float() + self.dt_bias.float())
        return q, k, v, silence(info, -self.A_log.float().exp() * dt), silence(info, dt)

    def scan(
        self, inputs: States, state: States | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """As `RecurrentMixer.scan`."""
        o, final = super().scan(inputs, state, output_final_state, cu_seqlens)
        return o + self._skip(inputs[2]), final

    def step(self, inputs: States, state: States) -> Tensor:
        """As `RecurrentMixer.step`."""
        return super().step(inputs, state) + self._skip(inputs[2])

    def _skip(self, v: Tensor) -> Tensor:
        """D v for every query head: [..., H, V] to [..., HQ, V]."""
        return v.repeat_interleave(self.query_heads // self.heads, -2) * self.D[:, None].to(v.dtype)
