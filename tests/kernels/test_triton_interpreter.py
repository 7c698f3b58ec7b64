"""Runs the Triton tests in Triton's interpreter where there is no GPU.

In a process of their own: TRITON_INTERPRET counts only when it is set before anything imports triton.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.parametrize("module", ["bf16", "gates", "gla", "gsa", "gsa_walk", "memory"])
def test_in_the_interpreter(module):
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(HERE / f"test_triton_{module}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
