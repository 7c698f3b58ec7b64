"""Launching kernels at a third of what Triton's own way costs in Python."""

from typing import Any

import triton.language as tl

_PLAIN = frozenset({bool, int, float, str, type(None), tl.dtype})
_compiled: dict[tuple, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options): `args` from the first on, `options` the rest of the kernel's and of the launch,
    in one order wherever a kernel is launched.

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
        run = compiled[(*grid, 1, 1)[:3]]
        rest = [options[name] for name in kernel.arg_names[len(args) :]]
        _compiled[key] = (lambda *args: run(*args, *rest)) if rest else run
