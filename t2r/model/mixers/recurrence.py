"""What the mixers on `t2r_kernels.gla` share."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from t2r.model.mixers.base import RecurrentMixer, States, head_shape
from t2r.model.sequence import SequenceInfo
from t2r_kernels import gla, gla_step


class LinearRecurrence(RecurrentMixer):
    """S_t = alpha_t S_{t-1} + write_t k_t v_t^T, o_t = scale q_t S_t, with one state S [H, D, V] per sequence.

    `inputs` gives q, k, v, then log alpha where there is a `gate`, then the write weights where the kind `writes` them.
    """

    gate: ClassVar[str | None] = None
    writes: ClassVar[bool] = False
    scale: float | None = 1.0

    def scan(
        self, inputs: States, state: States | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """As `RecurrentMixer.scan`."""
        o, final = gla(
            *inputs[:3],
            **self._gates(inputs),
            scale=self.scale,
            initial_state=None if state is None else state[0],
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        return o, None if final is None else (final,)

    def step(self, inputs: States, state: States) -> Tensor:
        """As `RecurrentMixer.step`."""
        q, k, v, *_ = inputs
        gates = self._gates(inputs)
        return gla_step(q, k, v, gates.pop("log_decay"), state[0], **gates, scale=self.scale)

    def _gates(self, inputs: States) -> dict[str, Any]:
        rest = list(inputs[3:])
        log_decay = rest.pop(0) if self.gate else None
        return {"log_decay": log_decay, "gate": self.gate, "write": rest.pop(0) if self.writes else None}

    @classmethod
    def state_shapes(cls, config: PreTrainedConfig, options: Any) -> list[tuple[int, ...]]:
        """As `Mixer.state_shapes`: S."""
        _, heads, dim = head_shape(config)
        return [(heads, dim, dim)]


def silence(info: SequenceInfo, x: Tensor) -> Tensor:
    """x [B, T, ...] with zeros at padding: a key that writes nothing, a log decay that forgets nothing."""
    return x if info.mask is None else x.masked_fill(~info.mask[(...,) + (None,) * (x.dim() - 2)], 0)


def retention(heads: int, device: torch.device) -> Tensor:
    """[H] log decays of RetNet (arXiv 2307.08621, equation 8): log(1 - 2^(-5 - h))."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, device=device, dtype=torch.float32))))
