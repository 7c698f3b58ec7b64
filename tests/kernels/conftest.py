"""Fixtures of the kernels' tests."""

import os
import random

import pytest


@pytest.fixture
def seed() -> int:
    """New random inputs in every run; T2R_TEST_SEED repeats one. pytest prints it with a failure."""
    drawn = int(os.environ.get("T2R_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"T2R_TEST_SEED={drawn}")
    return drawn
