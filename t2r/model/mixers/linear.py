"""Linear attention: a feature map in the place of the softmax, and a denominator or a norm."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import MixerOptions, RMSNorm, Rotary, States, head_shape, rotate
from t2r.model.mixers.recurrence import LinearRecurrence, retention, silence
from t2r.model.sequence import SequenceInfo
from t2r_kernels import gla, gla_step

_SMALLEST = 1e-6  # of a denominator; ReLU features may all be zero


class LinearOptions(MixerOptions):
    """Options of `linear`."""

    name: Literal["linear"] = "linear"
    map: Literal["elu", "relu", "t2r", "hedgehog", "supra"] = Field("hedgehog", description="the feature map")


class LinearMixer(LinearRecurrence):
    """o_t = f(q_t) S_t / f(q_t) z_t with S_t = S_{t-1} + f(k_t) v_t^T and z_t = z_{t-1} + f(k_t).

    The maps f, on q and k with the host's rotary positions:
        elu       elu(x) + 1                            Katharopoulos et al., arXiv 2006.16236
        relu      relu(x)
        t2r       relu(W x + b), W and b per head       Kasai et al., arXiv 2103.13076
        hedgehog  softmax of (W x, -W x), W per head    Zhang et al., arXiv 2402.04347; twice as many features
    and SUPRA (Mercat et al., arXiv 2405.06640), `supra`: relu(W x + b), rotary positions after the map, a fixed decay
    per key/value head (RetNet's) and RMSNorm per head with weights in the place of the denominator.
    """

    options_class: ClassVar[type[MixerOptions]] = LinearOptions

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: LinearOptions, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        if options.map in ("t2r", "hedgehog", "supra"):
            self.q_map = nn.Parameter(torch.empty(self.query_heads, self.head_dim, self.head_dim))
            self.k_map = nn.Parameter(torch.empty(self.heads, self.head_dim, self.head_dim))
        if options.map in ("t2r", "supra"):
            self.q_bias = nn.Parameter(torch.empty(self.query_heads, self.head_dim))
            self.k_bias = nn.Parameter(torch.empty(self.heads, self.head_dim))
        self.decays = options.map == "supra"
        if self.decays:
            self.g_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.scale, self.gate = self.scaling, "scalar"  # type: ignore[misc]

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Kasai's maps normal with deviation D^-0.5, the others the identity; biases 0, the norm's weight 1."""
        values: dict[str, Tensor] = {}
        for name, heads in (("q", self.query_heads), ("k", self.heads)):
            if hasattr(self, f"{name}_map"):
                weight = torch.eye(self.head_dim, device="cpu").repeat(heads, 1, 1)
                if self.options.map == "t2r":
                    weight.normal_(std=self.head_dim**-0.5, generator=generator)
                values[f"{name}_map"] = weight
            if hasattr(self, f"{name}_bias"):
                values[f"{name}_bias"] = torch.zeros(heads, self.head_dim, device="cpu")
        return values | ({"g_norm.weight": torch.ones(self.head_dim, device="cpu")} if self.decays else {})

    def inputs(
        self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, info: SequenceInfo
    ) -> States:
        """f(q), f(k) and v; for SUPRA also log alpha [B, T, H]."""
        if self.decays:
            q, k = rotate(self._features(q, "q"), self._features(k, "k"), rotary)
            log_decay = retention(self.heads, k.device).expand(k.shape[:3])
            return q, silence(info, k), v, silence(info, log_decay)
        q, k = rotate(q, k, rotary)
        return self._features(q, "q"), silence(info, self._features(k, "k")), v

    def _features(self, x: Tensor, side: str) -> Tensor:
        if self.options.map == "elu":
            return F.elu(x) + 1
        if self.options.map == "relu":
            return F.relu(x)
        x = torch.einsum("bthd,hde->bthe", x, self.get_parameter(f"{side}_map"))
        if self.options.map == "hedgehog":
            return torch.cat([x, -x], -1).softmax(-1)
        return F.relu(x + self.get_parameter(f"{side}_bias").to(x.dtype))

    def scan(
        self, inputs: States, state: States | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """As `RecurrentMixer.scan`; the states are S and, with a denominator, z [B, H, F, 1]."""
        if self.decays:
            return super().scan(inputs, state, output_final_state, cu_seqlens)
        q, k, v = inputs
        results = [
            gla(
                q,
                k,
                value,
                scale=1.0,
                initial_state=None if state is None else state[index],
                output_final_state=output_final_state,
                cu_seqlens=cu_seqlens,
            )
            for index, value in enumerate((v, torch.ones_like(v[..., :1])))
        ]
        (above, s), (below, z) = results
        return above / below.clamp(min=_SMALLEST), (s, z) if s is not None and z is not None else None

    def step(self, inputs: States, state: States) -> Tensor:
        """As `RecurrentMixer.step`."""
        if self.decays:
            return super().step(inputs, state)
        q, k, v = inputs
        above = gla_step(q, k, v, None, state[0], scale=1.0)
        return above / gla_step(q, k, torch.ones_like(v[..., :1]), None, state[1], scale=1.0).clamp(min=_SMALLEST)

    def finish(self, o: Tensor) -> Tensor:
        """As `RecurrentMixer.finish`."""
        return (self.g_norm(o) if self.decays else o).flatten(2)

    @classmethod
    def state_shapes(cls, config: PreTrainedConfig, options: LinearOptions) -> list[tuple[int, ...]]:
        """As `Mixer.state_shapes`: S and, with a denominator, z."""
        _, heads, dim = head_shape(config)
        if options.map == "supra":
            return [(heads, dim, dim)]
        features = 2 * dim if options.map == "hedgehog" else dim
        return [(heads, features, dim), (heads, features, 1)]
