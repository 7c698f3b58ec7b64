"""Time and memory of a conversion against `cp -r` and `sync` on the same disk.

    python tests/convert/bench_convert.py FOLDER [--layers 32]

Writes a synthetic checkpoint of Mistral-7B's shapes (14.5 GB at 32 layers) below FOLDER, copies it, converts it, each
with the source out of the page cache, prints one JSON line and removes everything. Needs three times the checkpoint's
size on the disk for safety.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from t2r.convert.headers import build_header
from t2r.convert.plan import TensorPlan, build_index, group_into_shards

CONVERT = """
import json, re, sys, time
from pathlib import Path
from t2r.convert import convert
from t2r.model.mixers import parse_options
def peak():  # not ru_maxrss, which starts at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before, start = peak(), time.perf_counter()
convert(sys.argv[1], sys.argv[2], mixers=parse_options({"name": "gsa"}))
seconds, cpu = time.perf_counter() - start, time.process_time()
print(json.dumps({"seconds": seconds, "cpu": cpu, "above_interpreter": peak() - before}))
"""


def make_checkpoint(folder: Path, layers: int) -> int:
    """Random finite bfloat16 weights in shards of 5 GB; returns the bytes of the largest tensor."""
    config = MistralConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["MistralForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    tensors = [TensorPlan(name, "new", "BF16", tuple(x.shape)) for name, x in state.items()]
    shards = group_into_shards(tensors, 5 * 10**9)
    # no exponent of all ones: no NaN, no Inf
    pool = (np.random.default_rng(0).integers(0, 2**16, 1 << 26, dtype=np.uint16) & 0xBFFF).tobytes()
    for number, (file, group) in enumerate(shards.items()):
        with open(folder / file, "wb") as out:
            out.write(build_header((t.name, t.dtype, t.shape) for t in group))
            for position, tensor in enumerate(group):
                start, left = (number * 7919 + position * 104729) * 2 % (1 << 26), tensor.nbytes
                while left:
                    part = pool[start : start + left]
                    out.write(part)
                    left -= len(part)
                    start = 0
    (folder / "model.safetensors.index.json").write_text(json.dumps(build_index(shards)))
    return max(t.nbytes for t in tensors)


def forget(folder: Path) -> None:
    """Write a folder's files out and drop them from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        (root / "source").mkdir()
        largest = make_checkpoint(root / "source", arguments.layers)
        size = sum(path.stat().st_size for path in (root / "source").iterdir())
        for _ in range(arguments.repeat):
            forget(root / "source")
            start = time.perf_counter()
            subprocess.run(["cp", "-r", root / "source", root / "copy"], check=True)
            os.sync()
            copy = time.perf_counter() - start
            shutil.rmtree(root / "copy")
            forget(root / "source")
            done = subprocess.run(
                [sys.executable, "-c", CONVERT, root / "source", root / "student"], check=True, capture_output=True
            )
            shutil.rmtree(root / "student")
            found = json.loads(done.stdout.splitlines()[-1])
            row = {
                "gigabytes": round(size / 1e9, 2),
                "cp_and_sync_seconds": round(copy, 1),
                "convert_seconds": round(found["seconds"], 1),
                "ratio": round(found["seconds"] / copy, 2),
                "convert_cpu_seconds": round(found["cpu"], 1),
                "peak_megabytes_above_interpreter": round(found["above_interpreter"] / 1e6),
                "bound_megabytes": round((2 * largest) / 1e6 + 300),
            }
            print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
