"""The decays inside each chunk of the general path, formed once for all its kernels.

For each token and head, rows of M: the write weight; the suffixes of levels 1 to LOG_C; the prefixes of levels 0 to
LOG_C (`triton_chunks.py` says what they are; a suffix of level 0 is 1, a prefix of level 0 alpha).
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import Chunks, Numerics, own_chunk, prefix_decay, split, suffix_decay
from ...triton_launch import launch
from .common import Blocks, load_log2_alpha, write_weight


@triton.jit
def decay_kernel(
    log_alpha, decays, gamma, bounds, T, NC, H,
    M: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BM: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One (chunk, piece): its decays [tokens, H, 2 LOG_C + 2, M], and its total decay gamma [chunks, H, M]."""
    c, h, start, stop, _n = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    x = load_log2_alpha(log_alpha, start, stop, h, H, M, C, BM)
    high, low = split(x, SPLIT)
    tl.store(gamma + (c.to(tl.int64) * H + h) * M + m, tl.exp2(tl.sum(x, 0)), mask=m < M)
    mask = ((start + i) < stop)[:, None] & (m < M)[None, :]
    at = chunk_decays(decays, start, h, H, M, LOG_C) + (i * (H * (2 * LOG_C + 2) * M))[:, None] + m[None, :]
    tl.store(at, write_weight(x), mask=mask)
    tl.store(at + (LOG_C + 1) * M, tl.exp2(x), mask=mask)
    for level in range(1, LOG_C + 1):
        tl.store(at + level * M, suffix_decay(i, high, low, level, SPLIT, EXACT), mask=mask)
        tl.store(at + (LOG_C + 1 + level) * M, prefix_decay(i, i, high, low, level, SPLIT, EXACT), mask=mask)


@triton.jit
def chunk_decays(decays, start, h, H, M: tl.constexpr, LOG_C: tl.constexpr):
    """Where those of a chunk's first token are."""
    return decays + (start * H + h) * ((2 * LOG_C + 2) * M)


@triton.jit
def load_weight(decays, i, valid, m, H, M: tl.constexpr, LOG_C: tl.constexpr):
    """Write weights [C, BM], 0 past the end and past M; `decays` as of `chunk_decays`."""
    at = decays + (i * (H * (2 * LOG_C + 2) * M))[:, None] + m[None, :]
    return tl.load(at, mask=valid[:, None] & (m < M)[None, :], other=0.0)


@triton.jit
def load_suffix(decays, level, i, valid, m, H, M: tl.constexpr, LOG_C: tl.constexpr):
    """Decay from after token i to the end of its block of 2^level tokens, [C, BM]."""
    at = decays + (i * (H * (2 * LOG_C + 2) * M))[:, None] + (level * M + m)[None, :]
    return tl.load(at, mask=valid[:, None] & (m < M)[None, :] & (level > 0), other=1.0)


@triton.jit
def load_prefix(decays, level, t, row_valid, m, H, M: tl.constexpr, LOG_C: tl.constexpr):
    """Decay from the start of t's block of 2^level tokens through t, [rows, BM]."""
    at = decays + (t * (H * (2 * LOG_C + 2) * M))[:, None] + ((LOG_C + 1 + level) * M + m)[None, :]
    return tl.load(at, mask=row_valid[:, None] & (m < M)[None, :], other=1.0)


def chunk_tables(log_alpha, chunks: Chunks, blocks: Blocks, numerics: Numerics):
    """(decays [tokens, H, 2 LOG_C + 2, M], decays of whole chunks [chunks, H, M]), both fp32."""
    B, T, H, M = log_alpha.shape
    log_c = blocks.chunk.bit_length() - 1
    decays = torch.empty(B * T, H, 2 * log_c + 2, M, dtype=torch.float32, device=log_alpha.device)
    gamma = torch.empty(chunks.count, H, M, dtype=torch.float32, device=log_alpha.device)
    launch(
        decay_kernel, (chunks.count * H, 1, 1),
        log_alpha, decays, gamma, chunks.bounds, T, chunks.per_sequence, H, M, blocks.chunk, log_c, blocks.slots,
        PACKED=chunks.bounds is not None, SPLIT=numerics.split, EXACT=numerics.exact, num_warps=4,
    )  # fmt: skip
    return decays, gamma
