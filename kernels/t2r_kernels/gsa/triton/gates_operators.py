"""gsa_gates as torch operators; imported by the first call that needs them, as `gsa/operators.py` is."""

import torch

from .gates import backward, forward, gradients, setup

gates_forward = torch.library.custom_op("t2r_kernels::gsa_gates_forward", mutates_args=())(forward)
gates_backward = torch.library.custom_op("t2r_kernels::gsa_gates_backward", mutates_args=())(backward)


@gates_forward.register_fake
def _(gate, bias, amplitude, position, mask, sinks, ring, tau):
    return gate.new_empty(gate.shape, dtype=torch.float32)


@gates_backward.register_fake
def _(dlog_alpha, gate, bias, amplitude, position, mask, sinks, ring, tau):
    like = gate.new_empty(gate.shape)
    sums = (gate.new_empty(0 if x is None else gate.shape[2:], dtype=torch.float32) for x in (bias, amplitude))
    return like, *sums


def _gradients(ctx, dlog_alpha):
    return gradients(ctx, dlog_alpha, gates_backward)


gates_forward.register_autograd(_gradients, setup_context=setup)
