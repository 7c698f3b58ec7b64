"""How kernels are launched, and the configurations of the fast path, measured on one H200 at D = V = 128, M = 64 and
groups of four heads."""

from typing import Any

import triton.language as tl

FORWARD = {"num_warps": 4, "num_stages": 2}
QUERY = {"num_warps": 4, "num_stages": 3}
QUERY_COLUMNS = 64
KEY = {"num_warps": 8, "num_stages": 2}
STATES = {"num_warps": 4, "num_stages": 3}
STATE_COLUMNS = 128
FORWARD_PROGRAMS = 2  # per multiprocessor: as many as fit at a time
STATE_PROGRAMS = 3


def for_group(options: dict[str, int], group: int) -> dict[str, int]:
    """`options`, with twice the warps where more than four query heads make a tile of 128 rows."""
    return {**options, "num_warps": 8} if group > 4 else options


_PLAIN = frozenset({bool, int, float, type(None), tl.dtype})
_compiled: dict[tuple, Any] = {}


def launch(kernel: Any, grid: tuple[int, int, int], *args: Any, **options: int) -> None:
    """kernel[grid](*args, **options) at a third of its cost in Python; `args` are all of the kernel's, in order.

    Triton binds and examines every argument anew at each launch. A compiled kernel depends on the arguments that are no
    tensors, and of tensors on their dtype and whether they start at a multiple of 16 bytes: that is the key here.
    """
    what = [x if type(x) in _PLAIN else (x.dtype, x.data_ptr() % 16) for x in args]
    key = (kernel, args[0].get_device(), grid, *options.values(), *what)
    run = _compiled.get(key)
    if run is not None:
        run(*args)
        return
    compiled = kernel[grid](*args, **options)
    if compiled is not None:  # as it is in Triton's interpreter
        if len(_compiled) == 4096:  # lengths are part of the key
            _compiled.clear()
        _compiled[key] = compiled[grid]
