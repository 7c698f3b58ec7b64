"""liger-kernel's norms and activations compute what the hosts' own do."""

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from t2r.train import fused

SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [(MistralConfig, MistralForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_agree(kind: tuple[Any, Any], dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    config, model = kind
    torch.manual_seed(0)
    plain, other = (model(config(**SIZES)).cuda() for _ in range(2))
    exact = model(config(**SIZES)).cuda().double()
    for x in (other, exact):
        x.load_state_dict(plain.state_dict())
    assert fused.fuse(other, torch.device("cuda"))
    tokens = torch.randint(64, (3, 67), device="cuda")
    losses = {}
    for name, x in {"plain": plain, "fused": other, "exact": exact}.items():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32 and name != "exact"):
            losses[name] = x(tokens, labels=tokens).loss
        losses[name].backward()
    assert losses["fused"].item() == pytest.approx(losses["exact"].item(), rel=1e-5 if dtype == torch.float32 else 1e-2)
    for (name, a), b, c in zip(plain.named_parameters(), other.parameters(), exact.parameters(), strict=True):
        error, allowed = (b.grad - c.grad).norm(), (a.grad - c.grad).norm()
        assert error <= 2 * allowed + 1e-5 * c.grad.norm(), name


def test_without_a_gpu_nothing_changes(models_pair: tuple[Any, Any]) -> None:
    student = models_pair[1]
    assert not fused.fuse(student, torch.device("cpu"))
    assert not [module for module in student.modules() if "forward" in vars(module)]


def test_without_liger_the_log_says_so_once(
    models_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "_told", set())
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert not fused.fuse(models_pair[1], torch.device("cuda"))
    assert not fused.fuse(models_pair[1], torch.device("cuda"))
    assert caplog.text.count("pip install 't2r[liger]'") == 1
