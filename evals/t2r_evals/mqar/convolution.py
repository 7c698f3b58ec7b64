"""A short causal convolution before each mixer, as Zoology's MQAR models have one (arXiv 2312.04927)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class ShortConvolution(nn.Module):
    """y_t = x_t + sum_j w_j x_{t-j} for j = 0 .. taps - 1, per channel, on x [B, T, width]."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, width).uniform_(-(taps**-0.5), taps**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        shifted = (functional.pad(x, (0, 0, j, 0))[:, :length] * w for j, w in enumerate(self.weight.to(x.dtype)))
        return x + sum(shifted)


def add_short_convolutions(model: Any, taps: int) -> None:
    """Put one before the attention, or what replaces it, in every layer of a transformers decoder; for training from
    scratch alone, for no cache holds the last tokens."""
    for layer in model.model.layers:
        layer.short_conv = ShortConvolution(model.config.hidden_size, taps)
        layer.self_attn.register_forward_pre_hook(_convolve(layer.short_conv), with_kwargs=True)


def _convolve(convolution: ShortConvolution) -> Any:
    def hook(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**keywords, "hidden_states": convolution(keywords["hidden_states"])}

    return hook
