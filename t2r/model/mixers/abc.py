"""Attention with bounded-memory control (Peng et al., arXiv 2110.02488): slots without a gate."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import MixerOptions, RecurrentMixer, RMSNorm, Rotary, States, head_shape, rotate
from t2r.model.sequence import SequenceInfo
from t2r_kernels import gsa, gsa_step

# logits in the place of -inf, from which no NaN can come: of an empty memory, and (lower still) of padding
_EMPTY, _PADDING = -1e9, -2e9


class ABCOptions(MixerOptions):
    """Options of `abc`."""

    name: Literal["abc"] = "abc"
    slots: int = Field(64, ge=1, le=4096)
    clamp: float | None = Field(None, gt=0.0, description="a is kept within plus and minus this")
    output_gate: bool = Field(False, description="RMSNorm per head and a swish gate from x before o_proj")


class ABCMixer(RecurrentMixer):
    """K_t and V_t are means of all keys and values so far, weighted per slot by exp(a_i) with a = W x; o_t as in `gsa`,
    with the host's rotary positions and scale.

    As a recurrence: alpha_t = Z_{t-1} / Z_t with Z_t = sum_{i <= t} exp(a_i). The running log Z [B, H, M] is the third
    state, so that decoding continues it.

    With `output_gate`, o becomes RMSNorm(o) * swish(U x) per query head. fla's layer has that always, and clamp 32:
    gate_proj is its s_proj, g_proj and g_norm have its names.
    """

    options_class: ClassVar[type[MixerOptions]] = ABCOptions

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: ABCOptions, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, self.heads * options.slots, bias=False)
        if options.output_gate:
            self.g_proj = nn.Linear(config.hidden_size, self.query_heads * self.head_dim, bias=False)
            self.g_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """W and U normal, the norm's weight 1."""
        rows = {"gate_proj.weight": self.heads * self.options.slots}
        if self.options.output_gate:
            rows["g_proj.weight"] = self.query_heads * self.head_dim
        width, std = self.config.hidden_size, self.config.initializer_range
        values = {
            name: torch.empty(count, width, device="cpu").normal_(std=std, generator=generator)
            for name, count in rows.items()
        }
        return values | ({"g_norm.weight": torch.ones(self.head_dim, device="cpu")} if "g_proj.weight" in rows else {})

    def inputs(
        self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, info: SequenceInfo
    ) -> States:
        """q, k, v, a [B, T, H, M] and, with an output gate, U x [B, T, HQ, V]."""
        a = self.gate_proj(hidden_states).float().unflatten(-1, (self.heads, -1))
        if self.options.clamp is not None:
            a = a.clamp(-self.options.clamp, self.options.clamp)
        if info.mask is not None:
            a = a.masked_fill(~info.mask[:, :, None, None], _PADDING)
        gate = (self.g_proj(hidden_states).unflatten(-1, q.shape[2:]),) if self.options.output_gate else ()
        return *rotate(q, k, rotary), v, a, *gate

    def scan(
        self, inputs: States, state: States | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """As `RecurrentMixer.scan`."""
        q, k, v, a, *gate = inputs
        before, total = running_total(a, None if state is None else state[2], cu_seqlens)
        o, final = gsa(
            q,
            k,
            v,
            F.logsigmoid(before - a),
            scale=self.scaling,
            initial_state=None if state is None else (state[0], state[1]),
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        return self._gated(o, *gate), None if final is None else (*final, total)

    def step(self, inputs: States, state: States) -> Tensor:
        """As `RecurrentMixer.step`."""
        q, k, v, a, *gate = inputs
        keys, values, total = state
        o = gsa_step(q, k, v, F.logsigmoid(total - a), (keys, values), scale=self.scaling)
        total.copy_(torch.logaddexp(total, a))
        return self._gated(o, *gate)

    def _gated(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        return o if gate is None else self.g_norm(o) * F.silu(gate)

    @classmethod
    def state_shapes(cls, config: PreTrainedConfig, options: ABCOptions) -> list[tuple[int, ...]]:
        """As `Mixer.state_shapes`: K, V and log Z."""
        _, heads, dim = head_shape(config)
        return [(heads, options.slots, dim)] * 2 + [(heads, options.slots)]


def running_total(a: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """log Z of a [B, T, H, M] before each token, shaped alike, and after the last one [B, H, M].

    `initial` [B, H, M] is log Z before the first token; documents of `cu_seqlens` each begin empty.
    """
    empty = torch.full_like(a[:, :1], _EMPTY)
    if cu_seqlens is None:
        start = empty if initial is None else initial[:, None]
        totals = torch.logcumsumexp(torch.cat([start, a], 1), 1)
        return totals[:, :-1], totals[:, -1]
    token = torch.arange(a.shape[1], device=a.device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True)
    # one scan for all documents, each lifted so far above the one before that nothing of that one is left (exp(-60))
    exact = a.double()
    lift = (exact.amax() - exact.amin() + 60.0).detach() * document[None, :, None, None]
    totals = (torch.logcumsumexp(exact + lift, 1) - lift).to(a.dtype)
    first = torch.cat([document.new_ones(1), document.diff()]) != 0
    before = torch.cat([empty, totals[:, :-1]], 1).masked_fill(first[None, :, None, None], _EMPTY)
    return before, totals[:, -1]
