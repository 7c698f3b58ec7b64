"""Times gla on one GPU, gate by gate: `python kernels/benchmarks/gla.py --output DIR`.

Prints a table and writes `gla.json`. A gate whose result does not agree with the float64 definition in the same run
gets no time. Beside it stand the torch path, which runs where there is no Triton, and the floor in bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from gsa import HQ, TOLERANCE, D, H, copy_bandwidth, median_ms

from t2r_kernels import gla, gla_step

V = D
GATES = ("key", "value", "scalar", None)
SHAPES = ((16, 2048), (1, 32768))
BATCHES = (1, 16, 64, 256)


def gate_numbers(gate: str | None) -> int:
    """How many numbers a gate has per token."""
    return {"key": H * D, "value": H * V, "scalar": H, None: 0}[gate]


def forward_bytes(tokens: int, gate: str | None) -> int:
    """q, k, v and o in bf16 and log_decay in fp32, each once."""
    return tokens * (2 * (HQ * D + H * D + H * V + HQ * V) + 4 * gate_numbers(gate))


def backward_bytes(tokens: int, gate: str | None) -> int:
    """The forward's inputs and do read once, dq, dk, dv and dlog_decay written once."""
    return tokens * (2 * (2 * HQ * D + HQ * V + 2 * H * D + 2 * H * V) + 8 * gate_numbers(gate))


def inputs(gate: str | None, *lead: int):
    """q, k, v and log_decay (drawn as logsigmoid(randn) / 16); `lead` is [B, T], or [B] for a step."""
    q, k, v = (torch.randn(*lead, heads, D, device="cuda", dtype=torch.bfloat16) for heads in (HQ, H, H))
    if gate is None:
        return [q, k, v]
    shape = (*lead, H) if gate == "scalar" else (*lead, H, D)
    return [q, k, v, F.logsigmoid(torch.randn(shape, device="cuda")) / 16]


def worst_error(gate: str | None) -> float:
    """Largest relative error of output and gradients on 333 tokens, in norm and by rows (against row + mean)."""
    args = [x.requires_grad_() for x in inputs(gate, 1, 333)]
    exact = [x.detach().double().requires_grad_() for x in args]
    got, want = gla(*args, gate=gate, backend="triton")[0], gla(*exact, gate=gate, backend="naive")[0]
    grad = torch.randn_like(got)
    pairs = zip(
        (got, *torch.autograd.grad(got, args, grad)),
        (want, *torch.autograd.grad(want, exact, grad.double())),
        strict=True,
    )
    worst = 0.0
    for x, y in pairs:
        error, size = (x.double() - y).norm(dim=-1), y.norm(dim=-1)
        rows = (error / (size + size.square().mean().sqrt())).max()
        worst = max(worst, (error.norm() / size.norm()).item(), rows.item())
    return worst if worst == worst else float("inf")


def measure(gate: str | None, batch: int, length: int, backend: str) -> dict:
    """Forward and forward+backward ms."""
    args = [x.requires_grad_() for x in inputs(gate, batch, length)]
    run = partial(gla, *args, gate=gate, backend=backend)
    grad = torch.randn_like(args[0])
    with torch.no_grad():
        forward = median_ms(run)
    both = median_ms(lambda: torch.autograd.grad(run()[0], args, grad))
    return {"forward_ms": round(forward, 4), "forward_backward_ms": round(both, 4)}


def measure_step(gate: str | None, batch: int, bandwidth: float) -> dict:
    """One decode step of one layer, from a CUDA graph over eight layers' states, which no cache holds together."""
    layers = 8
    states = [torch.randn(batch, H, D, V, device="cuda") for _ in range(layers)]
    q, k, v, *rest = inputs(gate, batch)
    log_decay = rest[0] if rest else None
    exact = [x if x is None else x.double() for x in (q, k, v, log_decay, states[0])]
    want = gla_step(*exact, gate=gate, backend="naive")
    step: Callable = partial(gla_step, q, k, v, log_decay, gate=gate, backend="triton")
    error = ((step(states[0].clone()).double() - want).norm() / want.norm()).item()
    if not error < TOLERANCE:
        return {"batch": batch, "error": error}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for state in states:
            step(state)
    ms = median_ms(graph.replay) / layers
    moved = batch * (2 * 4 * H * D * V + 4 * gate_numbers(gate) + 2 * (HQ * D + H * D + H * V + HQ * V))
    share = moved / (ms / 1e3) / bandwidth
    return {"batch": batch, "error": error, "ms": round(ms, 5), "bytes": moved, "of_copy_bandwidth": round(share, 3)}


def run(output: Path) -> dict:
    """Checks, measures and writes gla.json into `output`; returns what it wrote."""
    import triton

    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(int(time.time()))
    bandwidth = copy_bandwidth()
    record: dict = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "heads": {"HQ": HQ, "H": H, "D": D, "V": V, "dtype": "bfloat16"},
        "copy_bandwidth_TB_s": round(bandwidth / 1e12, 3),
        "gates": [],
    }
    for gate in GATES:
        start = time.perf_counter()
        error = worst_error(gate)
        entry: dict = {"gate": gate, "error": error, "first_call_s": round(time.perf_counter() - start, 1), "rows": []}
        record["gates"].append(entry)
        if not error < TOLERANCE:
            continue
        for batch, length in SHAPES:
            tokens = batch * length
            floor = forward_bytes(tokens, gate) / bandwidth * 1e3
            row = {"batch": batch, "length": length, "floor_forward_ms": round(floor, 4)}
            row["floor_ms"] = round(floor + backward_bytes(tokens, gate) / bandwidth * 1e3, 4)
            entry["rows"].append(row | {name: measure(gate, batch, length, name) for name in ("triton", "torch")})
        entry["steps"] = [measure_step(gate, batch, bandwidth) for batch in BATCHES]
        (output / "gla.json").write_text(json.dumps(record, indent=1) + "\n")  # what is cut off leaves what it had
    print(table(record))
    return record


def table(record: dict) -> str:
    """The record as Markdown."""
    lines = [
        f"{record['device']}, torch {record['torch']}, triton {record['triton']}, bf16, HQ {HQ}, H {H}, D {D}, V {V}; "
        f"copy {record['copy_bandwidth_TB_s']} TB/s",
        "",
        "| gate, shape | ours, forward | + backward | torch, forward | + backward | floor, forward | + backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in record["gates"]:
        if not entry["rows"]:
            lines.append(f"| {entry['gate']}: no time, because its check failed (error {entry['error']:.1e}) |")
        for row in entry["rows"]:
            times = [f"{row[name][key]:.2f}" for name in ("triton", "torch") for key in row[name]]
            floors = [f"{row[key]:.2f}" for key in ("floor_forward_ms", "floor_ms")]
            shape = f"{entry['gate']}, {row['batch']} x {row['length']:,}"
            lines.append(f"| {' | '.join([shape, *times, *floors])} |")
    lines += ["", "| decode step, batch | gate | ms | of copy bandwidth |", "|---|---|---|---|"]
    for entry in record["gates"]:
        for step in entry.get("steps", ()):
            told = f"{step['ms']:.4f} | {step['of_copy_bandwidth']:.2f}" if "ms" in step else "check failed |"
            lines.append(f"| {step['batch']} | {entry['gate']} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-gla"))
    run(parser.parse_args().output)
