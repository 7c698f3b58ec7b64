"""Launching kernels at a fraction of what Triton's own way costs in Python: one by one here, whole passes of several by
`triton_passes.py`, which records what is launched here."""

import threading
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

Start = Callable[[int, Any], None]  # a compiled kernel on its grid: (stream, arguments, of tensors their addresses)

_PLAIN = frozenset({bool, int, float, str, type(None), tl.dtype})
_compiled: dict[tuple, Start] = {}
watching = threading.local()  # .recording: what looks on in this thread, a `triton_passes.Recording`


def on_device(device: int) -> torch.cuda.device | None:
    """To enter where `device` (-1: the CPU, in Triton's interpreter) is not the one that a launch would go to."""
    here = device < 0 or device == torch.cuda.current_device()
    return None if here else torch.cuda.device(device)


def stream_of(device: int) -> int:
    return driver.active.get_current_stream(device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), the first of `args` a tensor: `args` from the first on, `options` the rest of the
    kernel's and of the launch, in one order wherever a kernel is launched.

    Triton binds and examines every argument anew at each launch. A compiled kernel depends on the arguments that are no
    tensors, and of tensors on their dtype and whether they start at a multiple of 16 bytes: that is the key here.

    Where a program gets less shared memory than its stages of loads take (64 KiB on CDNA 2 and 3), it has fewer stages.
    """
    device = args[0].get_device()
    other = on_device(device)
    if other is not None:
        with other:
            return launch(kernel, grid, *args, **options)
    kinds, values = [], []
    for x in args:
        if type(x) in _PLAIN:
            kinds.append(x)
            values.append(x)
        else:
            address = x.data_ptr()
            kinds.append((x.dtype, address % 16))
            values.append(address)
    if torch.version.hip:  # there Triton counts in 32 bits where a tensor's memory ends within 2 GiB
        kinds += [x.untyped_storage().nbytes() < 2**31 for x in args if type(x) not in _PLAIN]
    key = (kernel.fn, device, grid, *options.values(), *kinds)  # a kernel's own hash is one of its source
    start = _compiled.get(key)
    if start is not None:
        start(stream_of(device), values)
    else:
        compiled = _first(kernel, grid, args, options)
        if compiled is not None:  # as it is in Triton's interpreter
            if len(_compiled) == 4096:  # lengths are part of the key
                _compiled.clear()
            start = _compiled[key] = _starter(compiled, grid, [options[x] for x in kernel.arg_names[len(args) :]])
    recording = getattr(watching, "recording", None)
    if recording is not None:
        recording.launched(start, args)
    return None


def _first(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict) -> Any:
    """kernel[grid](*args, **options), with as many of its stages as fit."""
    while True:
        try:
            return kernel[grid](*args, **options)
        except OutOfResources:
            if options.get("num_stages", 1) == 1:
                raise
            options["num_stages"] -= 1


def _starter(compiled: Any, grid: tuple[int, ...], rest: list) -> Start:
    """Starts a compiled kernel; `rest` are the arguments beyond those that it is given."""
    x, y, z = size = (*grid, 1, 1)[:3]
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook

    def start(stream: int, values: Any) -> None:
        if hooks[0].calls or hooks[1].calls:  # somebody looks on, Triton's profiler for one
            compiled[size](*values, *rest, stream=stream)
        else:
            run(x, y, z, stream, function, packed, None, None, None, *values, *rest)

    return start
