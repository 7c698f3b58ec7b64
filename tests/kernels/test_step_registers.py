"""gsa_step's program, compiled for an H100/H200 by the Triton that is installed: nothing may spill.

That hangs on which lanes Triton gives to which dimension of a tile, which is its own choice and has changed before.
"""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("group", "width", "prefetch"), [(4, 128, False), (4, 128, True), (8, 64, True), (4, 256, True)]
)
def test_a_step_keeps_to_its_registers(group, width, prefetch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from t2r_kernels.gsa.triton.step import layout, step_kernel

    names = step_kernel.arg_names
    pointers = dict.fromkeys(("q", "k", "v", "o"), "*bf16")
    pointers |= dict.fromkeys(("log_alpha", "state_k", "state_v"), "*fp32")
    blocks_k, blocks_v, *teams = layout(group, width, width, 64)
    sizes = (width, width, 64, group, blocks_k, blocks_v, False, *teams)
    fixed = dict(zip(names[names.index("D") :], (*sizes, prefetch), strict=True)) | {"visible": None}
    signature = {"H": "i32", "HQ": "i32", "G": "i32", "scale_log2": "fp32"} | pointers
    signature = {name: "constexpr" if name in fixed else signature[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(step_kernel, signature, {(names.index(name),): value for name, value in fixed.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    binary = tmp_path / "step.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    assert re.search(r"STACK:0\b", usage.stdout + usage.stderr), usage.stdout
