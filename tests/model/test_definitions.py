"""Every mixer on a linear recurrence against its docstring, token by token and head by head in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from t2r.model import Mixer, SequenceInfo

TOKENS = 19

Token = tuple[Tensor, Tensor, Tensor, Any, Any]  # q, k, v, alpha (numbers or by row of S) and the write weight


def rows(mixer: Any, x: Tensor, rotary: Any, *, rotated: bool) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """(query head, key/value head, q, k, v [T, D]) for every query head."""
    q, k, v = mixer.project(x)
    if rotated:
        q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2)
    group = mixer.query_heads // mixer.heads
    for head in range(mixer.query_heads):
        yield head, head // group, q[0, :, head], k[0, :, head // group], v[0, :, head // group]


def scan(q: Tensor, k: Tensor, v: Tensor, alpha: Any, write: Any) -> Tensor:
    """o_t = q_t S_t with S_t = alpha_t S_{t-1} + write_t k_t v_t^T; alpha_t is a number or [D]."""
    state, out = torch.zeros(k.shape[1], v.shape[1], dtype=torch.float64), []
    for t in range(len(q)):
        decay = alpha[t] if torch.is_tensor(alpha) else torch.tensor(alpha, dtype=torch.float64)
        state = decay[..., None] * state if decay.dim() else decay * state
        state = state + (write[t] if torch.is_tensor(write) else write) * torch.outer(k[t], v[t])
        out.append(q[t] @ state)
    return torch.stack(out)


def norm(x: Tensor, weight: Any = 1.0, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def retnet(m: Any, x: Tensor, rotary: Any) -> list[Tensor]:
    return [
        norm(m.scaling * scan(q, k, v, 1 - 2.0 ** (-5 - head), 1.0))
        for _, head, q, k, v in rows(m, x, rotary, rotated=True)
    ]


def gla(m: Any, x: Tensor, rotary: Any) -> list[Tensor]:
    alpha = torch.sigmoid(m.gk_proj(x)[0].unflatten(-1, (m.heads, -1))) ** (1 / 16)
    return [
        norm(m.scaling * scan(q.relu(), k.relu(), v, alpha[:, head], 1.0), m.g_norm.weight)
        for _, head, q, k, v in rows(m, x, rotary, rotated=False)
    ]


def gla_pooled(m: Any, x: Tensor, rotary: Any) -> list[Tensor]:
    out = []
    for _, _, q, k, v in rows(m, x, rotary, rotated=False):
        alpha = torch.sigmoid(k) ** (1 / 2)
        out.append(scan(q.softmax(-1), k.softmax(-1) * (1 - alpha), v, alpha, 1.0))
    return out


def hgrn2(m: Any, x: Tensor, rotary: Any) -> list[Tensor]:
    low = m.layer_idx / m.config.num_hidden_layers
    out = []
    for _, _, q, k, v in rows(m, x, rotary, rotated=False):
        forget = low + (1 - low) * torch.sigmoid(k)
        out.append(scan(q * torch.sigmoid(q), 1 - forget, v, forget, 1.0))
    return list(norm(torch.cat(out, -1), m.g_norm.weight).chunk(m.query_heads, -1))


def mamba2(m: Any, x: Tensor, rotary: Any) -> list[Tensor]:
    dt = torch.log1p(torch.exp(m.dt_proj(x)[0] + m.dt_bias))
    return [
        m.scaling * scan(q, k, v, torch.exp(-m.A_log[kv].exp() * dt[:, kv]), dt[:, kv]) + m.D[head] * v
        for head, kv, q, k, v in rows(m, x, rotary, rotated=False)
    ]


def linear(feature: Callable[[Any, Tensor, str, int], Tensor]) -> Callable[..., list[Tensor]]:
    def definition(m: Any, x: Tensor, rotary: Any) -> list[Tensor]:
        out = []
        for head, kv, q, k, v in rows(m, x, rotary, rotated=True):
            fq, fk = feature(m, q, "q", head), feature(m, k, "k", kv)
            out.append(scan(fq, fk, v, 1.0, 1.0) / scan(fq, fk, torch.ones_like(v[:, :1]), 1.0, 1.0).clamp(min=1e-6))
        return out

    return definition


def kasai(m: Any, x: Tensor, side: str, head: int) -> Tensor:
    return (x @ getattr(m, f"{side}_map")[head] + getattr(m, f"{side}_bias")[head]).relu()


def hedgehog(m: Any, x: Tensor, side: str, head: int) -> Tensor:
    mapped = x @ getattr(m, f"{side}_map")[head]
    return torch.cat([mapped, -mapped], -1).softmax(-1)


def supra(m: Any, x: Tensor, rotary: Any) -> list[Tensor]:
    out = []
    for head, kv, q, k, v in rows(m, x, rotary, rotated=False):
        mapped = (kasai(m, q, "q", head)[None, :, None], kasai(m, k, "k", kv)[None, :, None])
        fq, fk = (y[0, :, 0] for y in apply_rotary_pos_emb(*mapped, *rotary, unsqueeze_dim=2))
        out.append(norm(m.scaling * scan(fq, fk, v, 1 - 2.0 ** (-5 - kv), 1.0), m.g_norm.weight))
    return out


def bounded_memory(m: Any, x: Tensor, rotary: Any) -> list[Tensor]:
    """`abc`: slots that hold weighted means of all keys and values so far."""
    weight = m.gate_proj(x)[0].unflatten(-1, (m.heads, -1))
    weight = weight if m.options.clamp is None else weight.clamp(-m.options.clamp, m.options.clamp)
    out = []
    for head, kv, q, k, v in rows(m, x, rotary, rotated=True):
        o = []
        for t in range(TOKENS):
            share = weight[: t + 1, kv].softmax(0).T  # [M, t + 1]
            o.append((m.scaling * (share @ k[: t + 1]) @ q[t]).softmax(0) @ (share @ v[: t + 1]))
        mixed = torch.stack(o)
        if m.options.output_gate:
            gate = m.g_proj(x)[0].unflatten(-1, (m.query_heads, -1))[:, head]
            mixed = norm(mixed, m.g_norm.weight) * gate * torch.sigmoid(gate)
        out.append(mixed)
    return out


DEFINITIONS = {
    "retnet": retnet,
    "gla": gla,
    "gla-pooled": gla_pooled,
    "hgrn2": hgrn2,
    "mamba2": mamba2,
    "linear-elu": linear(lambda m, x, side, head: F.elu(x) + 1),
    "linear-relu": linear(lambda m, x, side, head: x.relu()),
    "linear-t2r": linear(kasai),
    "linear-hedgehog": linear(hedgehog),
    "linear-supra": supra,
    "abc": bounded_memory,
    "abc-gated": bounded_memory,
}


@torch.no_grad()
@pytest.mark.parametrize("mixer", DEFINITIONS, indirect=True)
def test_a_mixer_computes_what_its_docstring_says(mistral: Any, mixer: str) -> None:
    model = mistral.double()
    torch.manual_seed(1)
    x = torch.randn(1, TOKENS, model.config.hidden_size, dtype=torch.float64)
    position = torch.arange(TOKENS)[None]
    rotary = model.model.rotary_emb(x, position)
    for layer in model.model.layers:
        assert isinstance(layer.self_attn, Mixer)
        found, _ = layer.self_attn(x, rotary, SequenceInfo(position))
        expected = layer.self_attn.o_proj(torch.cat(DEFINITIONS[mixer](layer.self_attn, x, rotary), -1)[None])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
