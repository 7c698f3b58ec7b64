"""What each key/value head loses when it sees only the first tokens and the last: every head and every window from one
pass forward and one back over frozen weights, where measuring them one by one takes thousands of passes.

Let d_t be what a shorter window changes in a head group's output at token t, and F the Fisher information of the
teacher's predictions, which is the Hessian of KL(teacher || student) at the teacher. To second order

    KL = 1/2 d^T F d,     F = E[g g^T],     g = sum over tokens s of the gradient of log p(y_s),     y_s drawn from p_s.

Draws at different tokens are independent and their gradients have mean zero, so weighing the KL of token s by c_s is
weighing its gradient by sqrt(c_s), and one backward pass holds all tokens. Of d^T F d the terms of one and the same t
are kept, 1/2 sum_t (g_t . d_t)^2: thousands of draws in every window of text. (The whole, 1/2 (sum_t g_t . d_t)^2, is
one draw per pass. On the 27M teacher of docs/recovery.md the kept terms come closer to what measuring finds.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from t2r.convert.calibrate import far_repeats
from t2r.errors import InputError
from t2r.model.mixers.base import Mixer, head_shape, rotate
from t2r.model.mixers.window import Window
from t2r.model.sequence import SequenceInfo

_CHUNK_NUMBERS = 1 << 25  # logits held at once


def head_costs(
    teacher: Any,
    windows: Tensor,
    layers: Sequence[int],
    *,
    sinks: int,
    sizes: Sequence[int],
    far_share: float,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> Tensor:
    """The cost of every head at every size with everything else the teacher's, float64 [len(layers), H, len(sizes)].

    A cost is (1 - far_share) KL + far_share KL on far repeats (`far_repeats`), means in nats per token. One window is
    in memory at a time, and of its activations those of one layer and what goes into each.

    Args:
        teacher: a host's language model on its device; its weights stay as they are, gradients or not.
        windows: ids [N, T + 1].
        sinks, sizes: a head of size n sees the first `sinks` tokens and the last n - sinks.
        seed: of the labels that are drawn.
        advance: called after each window.

    Raises:
        InputError: a teacher whose predictions are not finite.
    """
    far = far_repeats(windows).to(teacher.device)
    ids = windows.to(teacher.device)
    weight = (1 - far_share) / far.numel() + far_share / max(1, int(far.sum())) * far
    generator = torch.Generator(teacher.device).manual_seed(seed)
    costs = torch.zeros(len(layers), head_shape(teacher.config)[1], len(sizes), dtype=torch.float64)
    views = [Window(sinks, size - sinks) for size in sizes]
    for row, weights in zip(ids[:, :-1].split(1), weight.sqrt(), strict=True):
        inputs, calls = _layer_inputs(teacher, row)
        gradient = _label_gradient(teacher, inputs.pop(), weights, generator)
        for layer in range(len(inputs) - 1, min(layers) - 1, -1):
            block = _Replayed(teacher, layer, inputs.pop(), calls[layer])
            gradient, of_heads = block.backward(gradient)
            if layer in layers:
                costs[layers.index(layer)] += block.costs(of_heads, views).cpu()
        advance()
    return costs


@torch.no_grad()
def _layer_inputs(teacher: Any, ids: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What goes into every layer and into the last norm, [1, T, hidden] each, and the layers' other arguments."""
    inputs: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def keep(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        calls.append(kwargs)

    modules = [*teacher.model.layers, teacher.model.norm]
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        teacher.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, calls


@torch.enable_grad()
def _label_gradient(teacher: Any, hidden: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient with respect to `hidden` [1, T, hidden] of sum_s weights[s] log p(y_s), y_s drawn from p_s."""
    size = max(1, _CHUNK_NUMBERS // teacher.config.vocab_size)
    found = []
    for x, weight in zip(hidden[0].split(size), weights.split(size), strict=True):
        x = x.detach().requires_grad_()
        log_p = teacher.lm_head(teacher.model.norm(x)).float().log_softmax(-1)
        if not log_p.isfinite().all():
            raise InputError(
                "the teacher gives predictions that are not finite: its weights hold NaN, Inf or too large numbers"
            )
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        found += torch.autograd.grad((weight * log_p.gather(-1, drawn)[:, 0]).sum(), x)
    return torch.cat(found)[None]


class _Replayed:
    """One layer of the teacher run again on its own input, with what its attention's heads read and gave.

    Args:
        hidden: the layer's input [1, T, hidden].
        call: its other arguments.
    """

    def __init__(self, teacher: Any, layer: int, hidden: Tensor, call: dict[str, Any]) -> None:
        block = teacher.model.layers[layer]
        self._mixer = Mixer(block.self_attn, teacher.config, None, layer)
        self._hidden = hidden.detach().requires_grad_()
        handles = [
            block.self_attn.register_forward_pre_hook(self._read, with_kwargs=True),
            block.self_attn.o_proj.register_forward_pre_hook(self._gave),
        ]
        try:
            with torch.enable_grad():
                self._out = block(self._hidden, **call)
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._attended, self._rotary = kwargs["hidden_states"].detach(), kwargs["position_embeddings"]

    def _gave(self, module: Any, args: tuple[Tensor, ...]) -> None:
        (self._o,) = args

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the layer's input and of its heads' outputs [1, T, HQ * D], from that of its output."""
        of_hidden, of_heads = torch.autograd.grad(self._out, (self._hidden, self._o), gradient)
        return of_hidden, of_heads

    @torch.no_grad()
    def costs(self, gradient: Tensor, views: Sequence[Window]) -> Tensor:
        """1/2 sum_t (g_t . d_t)^2 of every key/value head and view, float64 [H, len(views)]."""
        mixer = self._mixer
        q, k, v = mixer.project(self._attended)
        q, k = rotate(q, k, self._rotary)
        info = SequenceInfo.build(q.shape[0], q.shape[1], q.device)
        o = self._o.unflatten(-1, (mixer.heads, -1)).float()
        g = gradient.unflatten(-1, (mixer.heads, -1)).float()
        found = []
        for view in views:
            seen, _ = view.attend(q, k, v, info, None, False, mixer.scaling)
            change = seen.flatten(2).unflatten(-1, (mixer.heads, -1)).float() - o
            found.append((g * change).sum(-1).square().sum((0, 1), dtype=torch.float64) / 2)
        return torch.stack(found, -1)
