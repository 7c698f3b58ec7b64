"""Norms and activations by liger-kernel's Triton kernels, in the place of the hosts' chains of small ones."""

import importlib.metadata
import importlib.util
import logging
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

logger = logging.getLogger(__name__)

_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)
_told: set[str] = set()


def fuse(model: Any, device: torch.device) -> bool:
    """Run a host's RMSNorms and SwiGLUs by liger-kernel, where it is installed and `device` is a GPU.

    Parameters, their names and what is computed stay: the norm's mean square in float32, its output in the input's
    dtype; the activation in float32 inside its kernel. Which way it went is logged once per process.

    Returns:
        whether the kernels are in place.
    """
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("liger_kernel") is None:
        _tell("liger-kernel is not installed: norms and activations run unfused. pip install 't2r[liger]'")
        return False
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.forward = MethodType(_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, _MLPS) and model.config.hidden_act in ("silu", "swish"):
            module.forward = MethodType(_mlp, module)  # type: ignore[method-assign]
    _tell(f"Norms and activations run by liger-kernel {importlib.metadata.version('liger-kernel')}.")
    return True


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", False)


def _mlp(module: Any, x: Tensor) -> Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x)))


def _tell(line: str) -> None:
    if line not in _told:
        _told.add(line)
        logger.warning(line)
