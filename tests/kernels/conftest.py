"""Fixtures of the kernels' tests."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

from . import memcheck

HERE = Path(__file__).parent


@pytest.fixture
def seed() -> int:
    """New random inputs in every run; T2R_TEST_SEED repeats one. pytest prints it with a failure."""
    drawn = int(os.environ.get("T2R_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"T2R_TEST_SEED={drawn}")
    return drawn


@pytest.fixture(autouse=os.environ.get("TRITON_INTERPRET") == "1")
def no_access_outside_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    memcheck.install(monkeypatch)


@pytest.fixture(autouse=True)
def no_pass_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are recorded anew in each test: one may have changed what they launch."""
    passes = sys.modules.get("t2r_kernels.triton_passes")
    if passes is not None:
        monkeypatch.setattr(passes, "_programs", {})


def pytest_collection_modifyitems(items):
    """On a GPU the tests that elsewhere run in Triton's interpreter or in torch are tests of the GPU's kernels."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == HERE and item.path.name.startswith(("test_triton_", "test_compile")):
                item.add_marker(pytest.mark.gpu)
