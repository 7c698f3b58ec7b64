"""Gated Slot Attention (Zhang et al., arXiv 2409.07146) in two styles: `transfer`, which starts as the teacher's own
attention over sinks and a window, and `paper`."""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import MixerOptions, RecurrentMixer, RMSNorm, Rotary, States, head_shape, rotate
from t2r.model.mixers.groups import HeadGroup, HeadSizes, head_groups, join_heads, split_heads
from t2r.model.sequence import SequenceInfo
from t2r_kernels import gsa, gsa_gates, gsa_step

TRANSFER_ONLY = ("sinks", "ring", "clock_amplitude", "sink_amplitude", "half_lives")
PAPER_ONLY = ("tau", "norm_eps")


def _as_tuple(value: Any) -> Any:
    """YAML and JSON have lists alone."""
    return tuple(value) if isinstance(value, list) else value


class GSAOptions(MixerOptions):
    """Options of `gsa`. sinks + ring <= slots; slots beyond them are long-lived."""

    name: Literal["gsa"] = "gsa"
    style: Literal["transfer", "paper"] = "transfer"
    slots: HeadSizes = Field(64, description="of every key/value head, or a list with those of each (transfer)")
    sinks: int = Field(4, ge=0, description="slots that keep the first tokens (transfer)")
    ring: int | None = Field(None, ge=0, description="slots that keep the last tokens; slots - sinks (transfer)")
    # At 8 an old token fades over the last rounds of the ring instead of vanishing, which starts slightly better than
    # the exact window, and the gates keep a gradient. A sink has to last as long as the sequence.
    clock_amplitude: float = Field(8.0, ge=0.0, le=80.0, description="how firmly the clock sets the gates (transfer)")
    sink_amplitude: float = Field(16.0, ge=0.0, le=80.0, description="the same for the sinks (transfer)")
    half_lives: Annotated[tuple[float, float], BeforeValidator(_as_tuple)] = Field(
        (32.0, 2048.0), description="shortest and longest half-life of the long-lived slots, in tokens (transfer)"
    )
    tau: float = Field(8.0, gt=0.0, description="divisor of the logarithm of the gate (paper)")
    norm_eps: float | None = Field(None, gt=0.0, description="of the output's norm; the host's rms_norm_eps (paper)")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        paper = values.get("style") == "paper"
        if foreign := [key for key in (TRANSFER_ONLY if paper else PAPER_ONLY) if key in values]:
            raise ValueError(f"{', '.join(foreign)}: not an option of style {'paper' if paper else 'transfer'}")
        slots, sinks = values.get("slots", 64), values.get("sinks", 4)
        if paper and isinstance(slots, list | tuple):
            raise ValueError("slots: style paper has the same number in every head")
        if not paper and values.get("ring") is None and isinstance(slots, int) and isinstance(sinks, int):
            return {**values, "ring": max(slots - sinks, 0)}
        return values

    @model_validator(mode="after")
    def _fit(self) -> "GSAOptions":
        if isinstance(self.slots, tuple) and self.ring is not None:
            raise ValueError("ring: where slots is a list, every head's ring is what the sinks leave of its slots")
        fewest = self.slots if isinstance(self.slots, int) else min(self.slots)
        if self.style == "transfer" and self.sinks + (self.ring or 0) > fewest:
            raise ValueError(f"sinks {self.sinks} + ring {self.ring or 0} must be at most slots {fewest}")
        if not 0 < self.half_lives[0] <= self.half_lives[1]:
            raise ValueError(f"half_lives {self.half_lives}: must be positive, the shortest first")
        return self

    def stored(self) -> dict[str, Any]:
        """As `MixerOptions.stored`, without the other style's options."""
        foreign = TRANSFER_ONLY if self.style == "paper" else PAPER_ONLY
        return {key: value for key, value in super().stored().items() if key not in foreign}


class GSAMixer(RecurrentMixer):
    """K_t = alpha_t K_{t-1} + (1 - alpha_t) k_t, V_t likewise, o_t = V_t^T softmax(scale K_t q_t), per key/value head.

    transfer: q, k, v, RoPE, scale and o_proj are the host's, and

        alpha_t = sigmoid(W x_t + b + a * clock(t)),    alpha = 0 in every slot at the first token of a sequence.

    The clock is -1 in the slot that token t writes and +1 in the other sinks and the rest of the ring: token t < S
    writes slot t, token t >= S slot S + (t - S) mod R. Token t sees the first t + 1 slots. As a grows this is softmax
    attention over the first S and the last R tokens, exactly and at every t. Long-lived slots have no clock; their b
    is the logit of a half-life. The gates of the first token make every slot a weighted mean of keys from the start
    (one that shrinks towards zero would pull the softmax with it).

    paper: swish on q, k and v, no positions, scale 1, alpha_t = sigmoid(W x_t)^(1/tau), and RMSNorm(swish(o)) over all
    heads before o_proj. Parameters correspond to fla's layer: gate_proj is its f_proj, g_norm its g_norm.

    Heads may have different numbers of slots M. Those with the same number run together, and gates, inputs and states
    are kept group by group: the gates' parameters [H, M] of a single group, [sum of M] where there are several.
    """

    options_class: ClassVar[type[MixerOptions]] = GSAOptions

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: GSAOptions, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        self.groups = head_groups(options.slots, self.heads, "gsa: slots")
        self.widths = [len(group.heads) * group.size for group in self.groups]
        gates = (self.heads, self.groups[0].size) if len(self.groups) == 1 else (sum(self.widths),)
        self.gate_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        if options.style == "paper":
            eps = config.rms_norm_eps if options.norm_eps is None else options.norm_eps
            self.g_norm = RMSNorm(self.query_heads * self.head_dim, eps=eps)
            self.scaling = 1.0
        else:
            # apart from gate_proj, so that they are added in float32 however low the weights' precision is
            self.gate_bias = nn.Parameter(torch.empty(gates))
            self.clock_amplitude = nn.Parameter(torch.empty(gates))

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """transfer: W = 0, so that the clock alone decides. paper: W normal, norm weight 1."""
        options, shape = self.options, tuple(self.gate_proj.weight.shape)
        if options.style == "paper":
            std = self.config.initializer_range
            weight = torch.empty(shape, device="cpu").normal_(std=std, generator=generator)
            return {"gate_proj.weight": weight, "g_norm.weight": torch.ones(self.query_heads * self.head_dim)}
        starts = [self._start(group) for group in self.groups]
        bias, amplitude = (torch.cat(parts).view(self.gate_bias.shape) for parts in zip(*starts, strict=True))
        return {
            "gate_proj.weight": torch.zeros(shape, device="cpu"),
            "gate_bias": bias,
            "clock_amplitude": amplitude,
        }

    def _start(self, group: HeadGroup) -> States:
        """Bias and amplitude [heads * M] of a group's gates."""
        options = self.options
        long_lived = group.size - options.sinks - self._ring(group)
        bias = torch.zeros(group.size, device="cpu")
        if long_lived:
            shortest, longest = (math.log(x) for x in options.half_lives)
            half_life = torch.linspace(shortest, longest, long_lived, device="cpu").exp()
            # alpha = 2^(-1 / half-life); its logit is -log(2^(1 / half-life) - 1)
            bias[-long_lived:] = -torch.expm1(math.log(2.0) / half_life).log()
        amplitude = torch.full((group.size,), options.clock_amplitude, device="cpu")
        amplitude[: options.sinks] = options.sink_amplitude
        return bias.repeat(len(group.heads)), amplitude.repeat(len(group.heads))

    def _ring(self, group: HeadGroup) -> int:
        return group.size - self.options.sinks if self.options.ring is None else self.options.ring

    def _by_group(self, gates: Tensor) -> list[Tensor]:
        """[..., all gates], or parameters [H, M], as [..., heads, M] of each group."""
        if len(self.groups) == 1:
            return [gates if gates.dim() == 2 else gates.unflatten(-1, (self.heads, -1))]
        parts = zip(gates.split(self.widths, dim=-1), self.groups, strict=True)
        return [part.unflatten(-1, (len(group.heads), -1)) for part, group in parts]

    def inputs(
        self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, info: SequenceInfo
    ) -> States:
        """Of each group q, k, v, log_alpha [B, T, H, M] and, for transfer, how many slots each token sees [B, T]."""
        gates = self._by_group(self.gate_proj(hidden_states))
        if self.options.style == "paper":
            log_alpha = gsa_gates(gates[0], tau=self.options.tau, mask=info.mask)
            return F.silu(q), F.silu(k), F.silu(v), log_alpha
        heads = [split_heads(x, self.groups) for x in (*rotate(q, k, rotary), v)]
        parameters = (self._by_group(self.gate_bias), self._by_group(self.clock_amplitude))
        found: list[Tensor] = []
        for group, q, k, v, gate, bias, amplitude in zip(self.groups, *heads, gates, *parameters, strict=True):
            log_alpha = gsa_gates(
                gate,
                bias=bias,
                amplitude=amplitude,
                position=info.position,
                sinks=self.options.sinks,
                ring=self._ring(group),
                mask=info.mask,
            )
            found += [q, k, v, log_alpha, info.visible(group.size)]
        return tuple(found)

    def scan(
        self, inputs: States, state: States | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """As `RecurrentMixer.scan`."""
        outputs: list[Tensor] = []
        final: list[Tensor] = []
        for index, (q, k, v, log_alpha, *visible) in enumerate(self._each(inputs)):
            o, after = gsa(
                q,
                k,
                v,
                log_alpha,
                visible=visible[0] if visible else None,
                scale=self.scaling,
                initial_state=None if state is None else (state[2 * index], state[2 * index + 1]),
                output_final_state=output_final_state,
                cu_seqlens=cu_seqlens,
            )
            outputs.append(o)
            final += after or ()
        return join_heads(outputs, self.groups), tuple(final) or None

    def step(self, inputs: States, state: States) -> Tensor:
        """As `RecurrentMixer.step`."""
        outputs = []
        for index, (q, k, v, log_alpha, *visible) in enumerate(self._each(inputs)):
            seen, states = visible[0] if visible else None, (state[2 * index], state[2 * index + 1])
            outputs.append(gsa_step(q, k, v, log_alpha, states, visible=seen, scale=self.scaling))
        return join_heads(outputs, self.groups)

    def _each(self, inputs: States) -> list[States]:
        """What `inputs` returned, group by group."""
        size = len(inputs) // len(self.groups)
        return [inputs[first : first + size] for first in range(0, len(inputs), size)]

    def finish(self, o: Tensor) -> Tensor:
        """As `RecurrentMixer.finish`."""
        return self.g_norm(F.silu(o.flatten(2))) if self.options.style == "paper" else o.flatten(2)

    @classmethod
    def state_shapes(cls, config: PreTrainedConfig, options: GSAOptions) -> list[tuple[int, ...]]:
        """As `Mixer.state_shapes`: K and V of each group."""
        _, heads, dim = head_shape(config)
        groups = head_groups(options.slots, heads, "gsa: slots")
        return [(len(group.heads), group.size, dim) for group in groups for _ in "KV"]
