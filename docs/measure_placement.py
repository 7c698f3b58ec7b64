"""Time and memory of placing slots by head at Mistral-7B's configuration, with random weights on a GPU.

python docs/measure_placement.py [--output docs/mistral-7b/place.json]
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import torch

from t2r.cli import bench_config
from t2r.cli.place import WINDOW, WINDOWS
from t2r.convert.select_slots import in_words, place_slots
from t2r.model import parse_options
from t2r.train.speed import random_model
from t2r_evals.provenance import machine, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="mistral-7b", help="or a folder with a teacher's config.json")
    parser.add_argument("--layers", type=int, help="fewer layers than the configuration has")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    host = bench_config.host(options.config, options.layers)
    teacher = random_model(host, torch.bfloat16, device).eval()
    ids = torch.randint(host.vocab_size, (options.windows, options.window + 1))
    weights = sum(p.numel() * p.element_size() for p in teacher.parameters())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    finished: list[float] = [time.perf_counter()]
    entries = place_slots(
        teacher, ids, parse_options({"name": "gsa"}), slots=64, advance=lambda: finished.append(time.perf_counter())
    )
    record = {
        "machine": machine(),
        "versions": versions(),
        "options": {"config": options.config, "windows": options.windows, "window": options.window},
        "seconds": finished[-1] - finished[0],
        "seconds_of_each_window": [after - before for before, after in pairwise(finished)],
        "weight_bytes": weights,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    print(in_words(entries[:4]))
    print(json.dumps(record, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
