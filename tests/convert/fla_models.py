"""Random checkpoints in fla's format, and what fla's models compute, written down once more from their definition."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCABULARY, HIDDEN, MLP, LAYERS, HEADS, SLOTS, CLAMP, LOW_RANK = 96, 64, 80, 2, 4, 16, 1.5, 16
DIM = HIDDEN // HEADS
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_heads": HEADS, "norm_eps": 1e-5, "hidden_act": "swish", "use_short_conv": False, "expand_k": 1, "expand_v": 1,
    "elementwise_affine": True, "attn": None, "tie_word_embeddings": False, "max_position_embeddings": 256,
    "fuse_norm": True, "hidden_ratio": 4, "dtype": "bfloat16",
}  # fmt: skip
CONFIGS = {
    "gsa": COMMON | {"architectures": ["GSAForCausalLM"], "model_type": "gsa", "num_kv_heads": 2, "num_slots": SLOTS,
                     "gate_logit_normalizer": 8, "feature_map": "swish", "clamp_min": None},
    "gla": COMMON | {"architectures": ["GLAForCausalLM"], "model_type": "gla", "num_kv_heads": 2, "feature_map": "relu",
                     "use_output_gate": False, "use_gk": True, "use_gv": False, "clamp_min": None,
                     "attn_mode": "chunk"},
    "abc": COMMON | {"architectures": ["ABCForCausalLM"], "model_type": "abc", "num_slots": SLOTS, "use_rope": True,
                     "clamp_min": -CLAMP, "clamp_max": CLAMP, "gate_low_rank_dim": 16},
}  # fmt: skip


def kv_heads(kind: str) -> int:
    return CONFIGS[kind].get("num_kv_heads", HEADS)


def layer_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """fla's parameters of one layer."""
    kv, dim = kv_heads(kind) * DIM, DIM
    own = {
        "gsa": {"f_proj.weight": (kv_heads(kind) * SLOTS, HIDDEN), "g_norm.weight": (HIDDEN,)},
        "gla": {"gk_proj.0.weight": (LOW_RANK, HIDDEN), "gk_proj.1.weight": (kv, LOW_RANK), "gk_proj.1.bias": (kv,),
                "g_norm.weight": (dim,)},
        "abc": {"s_proj.weight": (HEADS * SLOTS, HIDDEN), "g_proj.weight": (HIDDEN, HIDDEN), "g_norm.weight": (dim,)},
    }[kind]  # fmt: skip
    projections = {"q_proj.weight": (HIDDEN, HIDDEN), "k_proj.weight": (kv, HIDDEN), "v_proj.weight": (kv, HIDDEN),
                   "o_proj.weight": (HIDDEN, HIDDEN)}  # fmt: skip
    rest = {"attn_norm.weight": (HIDDEN,), "mlp_norm.weight": (HIDDEN,), "mlp.gate_proj.weight": (MLP, HIDDEN),
            "mlp.up_proj.weight": (MLP, HIDDEN), "mlp.down_proj.weight": (HIDDEN, MLP)}  # fmt: skip
    return {f"attn.{name}": shape for name, shape in (projections | own).items()} | rest


def make_fla(
    folder: Path, kind: str = "gsa", *, layout: str = "today", dtype: torch.dtype = torch.bfloat16, **changes: object
) -> Path:
    """A random checkpoint with fla's names; "merged" is the layout before 2025. `changes` go into config.json."""
    torch.manual_seed(0)
    shapes = {"model.embeddings.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
              "lm_head.weight": (VOCABULARY, HIDDEN)}  # fmt: skip
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(kind).items()}
    tensors = {name: torch.randn(shape).mul(0.2).add(len(shape) == 1).to(dtype) for name, shape in shapes.items()}
    if layout == "merged":
        for layer in range(LAYERS):
            p = f"model.layers.{layer}."
            tensors[p + "mlp.gate_proj.weight"] = torch.cat(
                [tensors[p + "mlp.gate_proj.weight"], tensors.pop(p + "mlp.up_proj.weight")]
            )
            tensors[p + "attn.norm.weight"] = tensors.pop(p + "attn_norm.weight")
            tensors[p + "mlp.norm.weight"] = tensors.pop(p + "mlp_norm.weight")
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = CONFIGS[kind] | {"dtype": str(dtype).removeprefix("torch.")} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def reference_logits(kind: str, w: dict[str, torch.Tensor], ids: torch.Tensor, norm_eps: float = 1e-5) -> torch.Tensor:
    """[T, vocabulary] of fla's model in float64, token by token and head by head."""
    w = {name: x.double() for name, x in w.items()}
    x = w["model.embeddings.weight"][ids]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        own = {name.removeprefix(p): value for name, value in w.items() if name.startswith(p)}
        x = x + _MIX[kind](norm(x, own["attn_norm.weight"], norm_eps), own, norm_eps) @ own["attn.o_proj.weight"].T
        h = norm(x, own["mlp_norm.weight"], norm_eps)
        mlp = F.silu(h @ own["mlp.gate_proj.weight"].T) * (h @ own["mlp.up_proj.weight"].T)
        x = x + mlp @ own["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"], norm_eps) @ w["lm_head.weight"].T


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _projections(h: torch.Tensor, own: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [(h @ own[f"attn.{n}_proj.weight"].T).unflatten(-1, (-1, DIM)) for n in "qkv"]


def _gsa(h: torch.Tensor, own: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    q, k, v = (F.silu(x) for x in _projections(h, own))
    alpha = (torch.sigmoid(h @ own["attn.f_proj.weight"].T) ** (1 / 8)).unflatten(-1, (-1, SLOTS))
    outputs = torch.empty_like(q)
    for head in range(HEADS):
        shared = head // (HEADS // k.shape[1])
        keys = values = h.new_zeros(SLOTS, DIM)
        for t in range(len(h)):
            a = alpha[t, shared, :, None]
            keys = a * keys + (1 - a) * k[t, shared]
            values = a * values + (1 - a) * v[t, shared]
            outputs[t, head] = torch.softmax(keys @ q[t, head], 0) @ values
    return norm(F.silu(outputs.flatten(1)), own["attn.g_norm.weight"], 1e-5)


def _gla(h: torch.Tensor, own: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    q, k, v = _projections(h, own)
    gate = h @ own["attn.gk_proj.0.weight"].T @ own["attn.gk_proj.1.weight"].T + own["attn.gk_proj.1.bias"]
    alpha = (torch.sigmoid(gate) ** (1 / 16)).unflatten(-1, (-1, DIM))
    outputs = torch.empty_like(q)
    for head in range(HEADS):
        shared = head // (HEADS // k.shape[1])
        state = h.new_zeros(DIM, DIM)
        for t in range(len(h)):
            state = alpha[t, shared, :, None] * state + F.relu(k[t, shared])[:, None] * v[t, shared]
            outputs[t, head] = DIM**-0.5 * F.relu(q[t, head]) @ state
    return norm(outputs, own["attn.g_norm.weight"], eps).flatten(1)


def _abc(h: torch.Tensor, own: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    q, k, v = _projections(h, own)
    angle = torch.arange(len(h))[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    q, k = rotate(q), rotate(k)
    weight = (h @ own["attn.s_proj.weight"].T).clamp(-CLAMP, CLAMP).exp().unflatten(-1, (-1, SLOTS))
    gate = (h @ own["attn.g_proj.weight"].T).unflatten(-1, (-1, DIM))
    outputs = torch.empty_like(q)
    for head in range(HEADS):
        for t in range(len(h)):
            share = weight[: t + 1, head] / weight[: t + 1, head].sum(0)
            keys, values = share.T @ k[: t + 1, head], share.T @ v[: t + 1, head]
            outputs[t, head] = torch.softmax(DIM**-0.5 * keys @ q[t, head], 0) @ values
    return (norm(outputs, own["attn.g_norm.weight"], eps) * F.silu(gate)).flatten(1)


_MIX = {"gsa": _gsa, "gla": _gla, "abc": _abc}
