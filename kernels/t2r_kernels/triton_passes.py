"""Passes that repeat their launches: the forward or backward pass of an operation, without its Python.

A pass is some dozens of lines around its launches, which at short lengths take longer than the kernels. What it
launches depends on the shapes and types of its tensors and on its plain arguments alone. So the first call with these
is recorded (kernels, grids, arguments, how much memory), and later ones repeat its launches with their own addresses.

A pass that does anything but allocate, view and launch (`Recording` sees every operator of torch) runs as it is
written, always.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .triton_launch import Start, on_device, stream_of, watching

_ALLOCATES = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})
_ALIGNED = 256  # bytes, of memory inside the workspace


class Recording(TorchDispatchMode):
    """Looks on while a pass runs."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []  # kept, so that no address is met twice
        self.launches: list[tuple[Start, tuple]] = []
        self.repeatable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _ALLOCATES:
            self.allocated.append(result)
        elif not func.is_view:
            self.repeatable = False
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler (over a second) at the first operator seen, to keep it away from here, where
        nothing is compiled: passes run as operators there, whose bodies no compiler enters."""
        return False

    def launched(self, start: Start | None, args: tuple) -> None:
        if start is None:
            self.repeatable = False
        else:
            self.launches.append((start, args))

    def __enter__(self) -> "Recording":
        watching.recording = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        watching.recording = None
        super().__exit__(*error)


class Output(NamedTuple):
    """In the result of a recorded pass, the place of a tensor that it made."""

    number: int


class Program:
    """What a pass launched when it was recorded.

    Every address is that of a root plus an offset. The roots are the tensors that the pass was given, those that it
    returns, and a workspace in which everything else that it allocated lies.
    """

    def __init__(self, recording: Recording, given: list[Tensor], result: Any) -> None:
        roots = {x.data_ptr(): (number, 0) for number, x in enumerate(given)}
        storages = {x.untyped_storage().data_ptr(): x for x in recording.allocated}
        self.outputs: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = []
        self.result = self._template(result, len(given), storages, roots)
        self.workspace = 0
        for start, x in storages.items():
            if start not in roots:
                roots[start] = (len(given) + len(self.outputs), self.workspace)
                self.workspace += -(-x.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
        self.addresses: dict[tuple[int, int], int] = {}
        self.constants: list[Any] = []
        where = [[self._place(x, roots, storages) for x in args] for _, args in recording.launches]
        # What a launch takes is picked from one list: all addresses, then all constants.
        self.launches = [
            (start, operator.itemgetter(*(i if here else len(self.addresses) + i for here, i in places)))
            for (start, _), places in zip(recording.launches, where, strict=True)
        ]

    def _template(self, result: Any, first: int, storages: dict, roots: dict) -> Any:
        """`result` with an `Output` in the place of every tensor; these become roots."""
        if isinstance(result, tuple):
            return tuple(self._template(x, first, storages, roots) for x in result)
        if not isinstance(result, Tensor):
            return result
        start = result.data_ptr()
        whole = start in storages and storages[start].untyped_storage().nbytes() == result.nbytes
        if start in roots or not whole or not result.is_contiguous():
            raise _NotRepeatable
        roots[start] = (first + len(self.outputs), 0)
        self.outputs.append((result.shape, result.stride(), result.dtype))
        return Output(len(self.outputs) - 1)

    def _place(self, x: Any, roots: dict, storages: dict) -> tuple[bool, int]:
        """Whether x is an address, and its number among these or among the constants."""
        if not isinstance(x, Tensor):
            self.constants.append(x)
            return False, len(self.constants) - 1
        start, offset = x.data_ptr(), 0
        if start not in roots:  # a view into something that the pass allocated
            offset = start - x.untyped_storage().data_ptr()
            start -= offset
            if start not in storages:
                raise _NotRepeatable
        root, first = roots[start]
        return True, self.addresses.setdefault((root, first + offset), len(self.addresses))

    def repeat(self, given: list[Tensor], addresses: list[int], device: int) -> Any:
        here = given[0].device
        # half the Python of torch.empty, which wonders about names and layouts
        made = [torch.empty_strided(size, stride, dtype=dtype, device=here) for size, stride, dtype in self.outputs]
        roots = addresses + [x.data_ptr() for x in made]
        if self.workspace:
            workspace = torch.empty(self.workspace, dtype=torch.uint8, device=here)
            roots.append(workspace.data_ptr())
        values = [roots[root] + offset for root, offset in self.addresses]
        values += self.constants
        stream = stream_of(device)
        for start, pick in self.launches:
            start(stream, pick(values))
        return _fill(self.result, made)


class _NotRepeatable(Exception):
    pass


def _fill(template: Any, made: list[Tensor]) -> Any:
    if type(template) is Output:
        return made[template.number]
    return tuple([_fill(x, made) for x in template]) if type(template) is tuple else template


def _examine(args: Any, given: list[Tensor], key: list) -> None:
    """Appends the tensors of args and what a pass may depend on."""
    for x in args:
        if isinstance(x, Tensor):
            given.append(x)
            key.append(x.shape)
            key.append(x.dtype)
        elif type(x) is tuple or type(x) is list:
            key.append(len(x))
            _examine(x, given, key)
        else:
            key.append(x)


_programs: dict[tuple, Program | None] = {}


def _program(recording: Recording, given: list[Tensor], result: Any) -> Program | None:
    try:
        return Program(recording, given, result) if recording.repeatable else None
    except _NotRepeatable:
        return None


def repeated(run: Callable) -> Callable:
    """The pass `run`, recorded and repeated.

    Its arguments are contiguous tensors, plain values that can be hashed, None, and tuples or lists of these; it
    returns tensors, None and tuples of these, and what it launches depends on nothing else.
    """

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        given: list[Tensor] = []
        about: list[Any] = []
        _examine(args, given, about)
        addresses = [x.data_ptr() for x in given]
        if len(set(addresses)) < len(addresses):  # one tensor given twice: which is meant, a recording cannot tell
            return run(*args)
        device = given[0].get_device()
        key = (run, device, *about, *[address % 16 for address in addresses])
        if key not in _programs:
            with Recording() as recording:
                result = run(*args)
            if len(_programs) == 4096:  # lengths are part of the key
                _programs.clear()
            _programs[key] = _program(recording, given, result)
            return result
        program = _programs[key]
        if program is None:
            return run(*args)
        other = on_device(device)
        if other is None:
            return program.repeat(given, addresses, device)
        with other:
            return program.repeat(given, addresses, device)

    return call
