"""Launch configurations, chosen on one H200 at D = V = 128 and groups of four: registers for these kernels, the rest
for an earlier form of them."""

from dataclasses import dataclass

import torch
import triton

from ...triton_chunks import pad
from .common import Plan


@dataclass(frozen=True)
class Launch:
    """`elements` of the state in one program (registers bound it), its warps where rows allow, its stages of loads.

    `registers` of a thread at most, see `options`.
    """

    elements: int
    warps: int
    stages: int
    registers: int | None = None


CHUNK = 64  # tokens: a state costs a program as much traffic as its inputs
NARROWEST = 32  # columns of a slice: with 16 Triton 3.6 was seen to compile into illegal accesses
THREE = 168  # registers of a thread with which three programs of four warps fit a multiprocessor
PAIRS = Launch(0, 8, 1)
PAIR_COLUMNS = 64
TILES = Launch(0, 8, 1, THREE)
TILE_COLUMNS = 64
PLAIN = Launch(8192, 8, 2, THREE)
GATED = Launch(8192, 8, 2)
WRITES = Launch(16384, 4, 2, THREE)
READS = Launch(16384, 4, 2)
GATED_GRADIENT = Launch(4096, 8, 1, THREE)  # holds two states
PLAIN_GRADIENT = Launch(8192, 8, 2, THREE)


def options(launch: Launch, plan: Plan, rows: int) -> dict[str, int]:
    """Warps and stages for products of at least `rows` rows: eight warps only where each has 16 rows to itself.

    With eight on 64 rows Triton 3.6 was seen to compile into wrong results and illegal accesses.

    Registers are bounded where that was measured: in bf16, D = V = 128, groups of four. Other sizes spill under it.
    """
    exact = plan.numerics.store == torch.float32
    chosen = {"num_warps": launch.warps if rows >= 128 else 4, "num_stages": 1 if exact else launch.stages}
    measured = not exact and plan.rows == 64 and pad(plan.R) == pad(plan.X) == 128
    if launch.registers and measured and not torch.version.hip:
        chosen["maxnreg"] = launch.registers
    return chosen


def fit(launch: Launch, plan: Plan, side: int, held: int) -> tuple[int, int, dict[str, int]]:
    """For a program that holds all `held` columns of one side of the state and a slice of the other, of `side` columns:
    the slice's width, how many there are, and the launch options."""
    exact = plan.numerics.store == torch.float32  # three passes need twice the operands, of twice the size
    width = max(NARROWEST, min(pad(side), launch.elements // (4 if exact else 1) // pad(held)))
    return width, triton.cdiv(side, width), options(launch, plan, min(plan.rows, pad(held)))
