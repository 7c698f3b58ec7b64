"""Logits to log alpha in one pass and back in one."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ...triton_chunks import ceil_div, power_of_two
from ...triton_launch import launch

TOKENS = tl.constexpr(16)
SPAN = 256  # tokens whose gradients for bias and amplitude one program sums


@triton.jit
def logits(
    gate, bias, amplitude, position, token, inside, c, C, M, sinks, ring, BIAS: tl.constexpr, CLOCK: tl.constexpr
):
    """gate + bias + amplitude * clock, and the clock (see `gates.clock`); [TOKENS, columns], columns (head, slot)."""
    here = inside[:, None] & (c < C)[None, :]
    x = tl.load(gate + token[:, None] * C + c[None, :], mask=here, other=0.0).to(tl.float32)
    beat = tl.zeros_like(x)
    if BIAS:
        x += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if CLOCK:
        t = tl.load(position + token, mask=inside, other=0)
        written = tl.where(t < sinks, t, sinks + (t - sinks) % tl.maximum(ring, 1))
        slot = c % M
        beat = tl.where(slot[None, :] == written[:, None], -1.0, 1.0)
        beat = tl.where((slot < sinks + ring)[None, :], beat, 0.0)
        x += tl.load(amplitude + c, mask=c < C, other=0.0).to(tl.float32)[None, :] * beat
    return x, beat, here


@triton.jit
def logsigmoid(x):
    """To full relative precision also for large x, where log(1 + y) would round: log1p(y) = 2 artanh(y / (2 + y))."""
    y = tl.exp(-tl.abs(x))
    z = y / (2.0 + y)  # at most 1/3
    s = z * z
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s / 15))))))
    return tl.minimum(x, 0.0) - 2.0 * z * series


@triton.jit
def gates_forward_kernel(
    gate, bias, amplitude, position, mask, log_alpha, N, C, M, sinks, ring, per_tau,
    BIAS: tl.constexpr, CLOCK: tl.constexpr, FIRST: tl.constexpr, MASKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = token < N
    x, _, here = logits(gate, bias, amplitude, position, token, inside, c, C, M, sinks, ring, BIAS, CLOCK)
    out = logsigmoid(x) * per_tau
    if FIRST:
        first = tl.load(position + token, mask=inside, other=1) == 0
        out = tl.where(first[:, None], float("-inf"), out)
    if MASKED:
        real = tl.load(mask + token, mask=inside, other=0) != 0
        out = tl.where(real[:, None], out, 0.0)
    tl.store(log_alpha + token[:, None] * C + c[None, :], out, mask=here)


@triton.jit
def gates_backward_kernel(
    gate, bias, amplitude, position, mask, dlog_alpha, dgate, dbias, damplitude, N, C, M, sinks, ring, per_tau,
    BIAS: tl.constexpr, CLOCK: tl.constexpr, FIRST: tl.constexpr, MASKED: tl.constexpr, BC: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """dgate of STEPS * TOKENS tokens, and their sums for bias and amplitude: one row each of dbias, damplitude."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    sum_bias = tl.zeros([BC], tl.float32)
    sum_amplitude = tl.zeros([BC], tl.float32)
    for step in range(STEPS):
        token = (tl.program_id(0).to(tl.int64) * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        inside = token < N
        x, beat, here = logits(gate, bias, amplitude, position, token, inside, c, C, M, sinks, ring, BIAS, CLOCK)
        dx = tl.load(dlog_alpha + token[:, None] * C + c[None, :], mask=here, other=0.0).to(tl.float32) * per_tau
        moves = inside
        if FIRST:
            moves = moves & (tl.load(position + token, mask=inside, other=0) != 0)
        if MASKED:
            moves = moves & (tl.load(mask + token, mask=inside, other=0) != 0)
        # the derivative of logsigmoid is sigmoid(-x); a fixed gate passes nothing on, whatever comes
        dx = tl.where(moves[:, None], dx * tl.sigmoid(-x), 0.0)
        tl.store(dgate + token[:, None] * C + c[None, :], dx, mask=here)
        if BIAS:
            sum_bias += tl.sum(dx, 0)
        if CLOCK:
            sum_amplitude += tl.sum(dx * beat, 0)
    row = tl.program_id(0).to(tl.int64) * C
    if BIAS:
        tl.store(dbias + row + c, sum_bias, mask=c < C)
    if CLOCK:
        tl.store(damplitude + row + c, sum_amplitude, mask=c < C)


def _arguments(gate: Tensor, bias, amplitude, position, mask, sinks: int, ring: int, tau: float):
    """(tensors, sizes, constants, columns of a program) that both kernels take."""
    tokens, columns = gate.shape[0] * gate.shape[1], gate.shape[2] * gate.shape[3]
    flags = {
        "BIAS": bias is not None, "CLOCK": amplitude is not None, "FIRST": position is not None,
        "MASKED": mask is not None, "BC": min(128, power_of_two(columns)),
    }  # fmt: skip
    bias, amplitude, position, mask = (None if x is None else x.contiguous() for x in (bias, amplitude, position, mask))
    mask = None if mask is None else mask.view(torch.uint8)
    return (bias, amplitude, position, mask), (tokens, columns, gate.shape[3], sinks, ring, 1.0 / tau), flags


def forward(
    gate: Tensor,
    bias: Tensor | None,
    amplitude: Tensor | None,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: int,
    ring: int,
    tau: float,
) -> Tensor:
    """log alpha."""
    gate = gate.contiguous()
    tensors, sizes, flags = _arguments(gate, bias, amplitude, position, mask, sinks, ring, tau)
    log_alpha = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
    grid = (ceil_div(sizes[0], TOKENS.value), ceil_div(sizes[1], flags["BC"]), 1)
    launch(gates_forward_kernel, grid, gate, *tensors, log_alpha, *sizes, *flags.values(), num_warps=4)
    return log_alpha


def backward(
    dlog_alpha: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    amplitude: Tensor | None,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: int,
    ring: int,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, and the gradients of bias and amplitude in fp32 (empty tensors without them)."""
    gate, dlog_alpha = gate.contiguous(), dlog_alpha.contiguous()
    tensors, sizes, flags = _arguments(gate, bias, amplitude, position, mask, sinks, ring, tau)
    programs = ceil_div(sizes[0], SPAN)
    dgate = torch.empty_like(gate)
    sums = [
        torch.empty(programs if x is not None else 0, *gate.shape[2:], dtype=torch.float32, device=gate.device)
        for x in (bias, amplitude)
    ]
    grid = (programs, ceil_div(sizes[1], flags["BC"]), 1)
    launch(
        gates_backward_kernel, grid, gate, *tensors, dlog_alpha, dgate, *sums, *sizes, *flags.values(),
        SPAN // TOKENS.value, num_warps=4,
    )  # fmt: skip
    dbias, damplitude = (
        x.new_empty(0) if given is None else x.sum(0) for x, given in zip(sums, (bias, amplitude), strict=True)
    )
    return dgate, dbias, damplitude


def setup(ctx, inputs, output):
    """Keeps what `gradients` needs: the inputs."""
    *tensors, ctx.sinks, ctx.ring, ctx.tau = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx, dlog_alpha, run: Callable):
    """The gradients of `forward`'s inputs, by `run` (`backward` or its operator)."""
    gate, bias, amplitude, position, mask = ctx.saved_tensors
    dgate, dbias, damplitude = run(dlog_alpha, gate, bias, amplitude, position, mask, ctx.sinks, ctx.ring, ctx.tau)
    dbias = None if bias is None else dbias.to(bias.dtype)
    damplitude = None if amplitude is None else damplitude.to(amplitude.dtype)
    return dgate, dbias, damplitude, None, None, None, None, None


class _Direct(torch.autograd.Function):
    """`forward` and `backward` as they are, without the cost of operators."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        setup(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlog_alpha):
        return gradients(ctx, dlog_alpha, backward)


def gates_triton(
    gate: Tensor,
    bias: Tensor | None,
    amplitude: Tensor | None,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: int,
    ring: int,
    tau: float,
) -> Tensor:
    """Shapes as in `t2r_kernels.gsa_gates`. Deterministic: the sums for bias and amplitude use no atomics."""
    run: Callable
    if dispatch.watched(gate):
        from .gates_operators import gates_forward

        run = gates_forward
    else:
        run = _Direct.apply if torch.is_grad_enabled() else forward
    return run(gate, bias, amplitude, position, mask, sinks, ring, tau)
