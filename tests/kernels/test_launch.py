"""What `launch` adds to Triton's own way: fewer stages where they do not fit, and what its key must tell apart."""

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from t2r_kernels import triton_launch
from t2r_kernels.triton_launch import launch


class Kernel:
    """Looks to `launch` like a kernel of which `fits` stages fit into shared memory; notes what is compiled and run."""

    arg_names = ("x", "size", "num")
    function = packed_metadata = None

    def __init__(self, fits: int):
        self.fn, self.fits, self.tried, self.runs = object(), fits, [], 0

    def __getitem__(self, grid):
        def first(*args, num_stages, **options):
            self.tried.append(num_stages)
            if num_stages > self.fits:
                raise OutOfResources(81920, 65536, "shared memory")
            return self

        return first

    def run(self, *args):
        self.runs += 1


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(triton_launch, "stream_of", lambda device: 0)


def test_a_launch_takes_as_many_stages_as_fit_and_remembers_it():
    kernel = Kernel(fits=1)
    for _ in range(2):
        launch(kernel, (4, 1, 1), torch.zeros(2), 2, num=3, num_stages=3)
    assert (kernel.tried, kernel.runs) == ([3, 2, 1], 1)


def test_what_does_not_fit_in_one_stage_says_so():
    with pytest.raises(OutOfResources, match="81920"):
        launch(Kernel(fits=0), (4, 1, 1), torch.zeros(2), 2, num=3, num_stages=2)


def test_on_rocm_a_tensor_beyond_2_gib_has_a_kernel_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel = Kernel(fits=2)
    for size in (2**31 - 1, 2**31, 2**31 - 1):  # never touched, so no memory is taken
        launch(kernel, (4, 1, 1), torch.empty(size, dtype=torch.uint8, device="meta"), 2, num=3, num_stages=2)
    assert (kernel.tried, kernel.runs) == ([2, 2], 1)
