"""What `repeated` records of a pass and when it leaves a pass alone, with kernels that run on the CPU."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from t2r_kernels import triton_launch, triton_passes
from t2r_kernels.triton_launch import launch
from t2r_kernels.triton_passes import Recording, repeated


class Kernel:
    """Looks to `launch` like a compiled kernel: `work` gets addresses as arrays of `size` fp32, and plain numbers."""

    function = packed_metadata = None
    arg_names = ()

    def __init__(self, work, size):
        self.fn, self.size, self.ran = work, size, 0

    def __getitem__(self, grid):
        def ready(*args, stream=None, **options):
            addresses = (x.data_ptr() if hasattr(x, "data_ptr") else x for x in args)
            self.run(*grid, stream, *[None] * 5, *addresses)
            return self

        return ready

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        self.ran += 1
        self.fn(*(self.array(x) if type(x) is int and x > 2**20 else x for x in args))

    def array(self, address):
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (self.size,))


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(triton_launch, "stream_of", lambda device: 0)
    monkeypatch.setattr(triton_passes, "stream_of", lambda device: 0)


@pytest.fixture
def kernel():
    def work(x, y, out, factor):
        out[:] = x + factor * y

    return Kernel(work, 8)


def test_recording_a_pass_does_not_import_torchs_compiler():
    """Which takes longer than all else that a new process does up to its first gradients."""
    lines = (
        "import sys, torch",
        "from t2r_kernels import triton_launch, triton_passes",
        "run = triton_passes.repeated(lambda x: torch.empty_like(x).view(-1))",
        "run(torch.ones(2))",
        "assert triton_passes._programs",
        "sys.exit('torch._dynamo' in sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


def numbers(start):
    return torch.arange(start, start + 8, dtype=torch.float32)


def test_a_pass_is_repeated_with_other_tensors(kernel):
    ran = []

    @repeated
    def run(pair, z, factor, nothing):
        ran.append(1)
        x, y = pair
        both, other = torch.empty(16), torch.empty_like(z)
        launch(kernel, (1, 1, 1), x, y, both, factor)
        launch(kernel, (1, 1, 1), x, z, both[8:], factor)  # a view, 32 bytes into what the pass allocated
        out = z.new_empty(2, 4)
        launch(kernel, (1, 1, 1), both, both[8:], other, 1.0)
        launch(kernel, (1, 1, 1), other, x, out, 0.0)
        return out, (other, None)

    for start, factor in ((0, 2.0), (10, 2.0), (20, 2.0), (0, 3.0), (5, 3.0)):
        x, y, z = numbers(start), numbers(start + 3), numbers(7 - start)
        out, (other, nothing) = run((x, y), z, factor, None)
        want = 2 * x + factor * (y + z)
        assert torch.equal(other, want)
        assert torch.equal(out, want.view(2, 4))
        assert nothing is None
    assert len(ran) == 2  # once for each factor
    assert kernel.ran == 4 * 5


def test_types_shapes_and_alignment_are_told_apart(kernel):
    ran = []

    @repeated
    def run(x):
        ran.append(x.shape)
        out = torch.empty_like(x)
        launch(kernel, (1, 1, 1), x, x, out, 1.0)
        return out

    room = torch.arange(16.0)
    for x in (
        numbers(0),
        numbers(1),
        numbers(0).view(2, 4),
        room[1:9],
        numbers(0).view(torch.int32),
        room[8:],
        room[2:10],
    ):
        run(x)
    assert len(ran) == 5  # numbers(1) and room[8:] are like the first; room[2:10] is eight bytes off, room[1:9] four


@pytest.mark.parametrize("what", ["computes", "returns what it got", "returns a part", "launches something foreign"])
def test_a_pass_that_does_more_than_launch_runs_as_it_is(kernel, what):
    ran = []
    foreign = numbers(100)

    @repeated
    def run(x):
        ran.append(1)
        out = torch.empty(16)
        launch(kernel, (1, 1, 1), x, foreign if "foreign" in what else x, out, 1.0)
        if what == "computes":
            out = out + 0
        return {"returns what it got": x, "returns a part": out[:8]}.get(what, out)

    for start in (0, 1, 2):
        run(numbers(start))
    assert len(ran) == 3


def test_a_tensor_given_twice_is_not_taken_for_two(kernel):
    @repeated
    def run(x, y):
        out = torch.empty_like(x)
        launch(kernel, (1, 1, 1), x, y, out, 1.0)
        return out

    x, y = numbers(0), numbers(5)
    assert torch.equal(run(x, x), x + x)
    assert torch.equal(run(x, y), x + y)
    assert torch.equal(run(y, x), x + y)
    assert torch.equal(run(y, y), y + y)


def test_a_profiler_is_called(kernel, monkeypatch):
    seen = []
    monkeypatch.setattr(triton_launch.knobs.runtime.launch_enter_hook, "calls", [seen.append])

    @repeated
    def run(x):
        out = torch.empty_like(x)
        launch(kernel, (1, 1, 1), x, x, out, 1.0)
        return out

    through = []
    ready = Kernel.__getitem__
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: through.append(grid) or ready(self, grid))
    for start in (0, 1):
        assert torch.equal(run(numbers(start)), 2 * numbers(start))
    assert len(through) == 2  # Triton's own way, which calls its hooks


def test_an_error_leaves_nothing_on():
    @repeated
    def run(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(numbers(0))
    assert triton_launch.watching.recording is None
    with Recording() as recording:
        numbers(0).add_(1)
    assert not recording.repeatable
