"""Times gla on one GPU, gate by gate: `python kernels/benchmarks/gla.py --output DIR`.

Prints a table and writes `gla.json`. What does not agree with the float64 definition in the same run gets no time.
Beside ours stand the torch path, which runs where there is no Triton, the floor in bytes and, where it is installed,
flash-linear-attention: chunk_gla for a gate on keys, chunk_simple_gla for one per head. It has no groups of query
heads: keys, values and gates are repeated for it, as its users have to.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from gsa import HQ, TOLERANCE, D, H, copy_bandwidth, layers_beyond_caches, median_ms, recorded, replay_ms

from t2r_kernels import gla, gla_step

V = D
GATES = ("key", "value", "scalar", None)
SHAPES = ((16, 2048, H), (1, 32768, H), (16, 2048, HQ))  # batch, length, key/value heads
BATCHES = (1, 16, 64, 256)


def fla(q, k, v, log_decay, *, gate: str | None):
    """flash-linear-attention's operator for this gate."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    k, v, log_decay = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v, log_decay))
    run = chunk_gla if gate == "key" else chunk_simple_gla
    return run(q, k, v, log_decay, scale=D**-0.5)


def candidates(gate: str | None, alone: bool) -> dict[str, Callable]:
    """What is timed, by name."""
    found: dict[str, Callable] = {name: partial(gla, gate=gate, backend=name) for name in ("triton", "torch")}
    if not alone and importlib.util.find_spec("fla") is not None and gate in ("key", "scalar"):
        found["fla"] = partial(fla, gate=gate)
    return found


def gate_numbers(gate: str | None) -> int:
    """How many numbers a gate has per token and key/value head."""
    return {"key": D, "value": V, "scalar": 1, None: 0}[gate]


def forward_bytes(tokens: int, heads: int, gate: str | None) -> int:
    """q, k, v and o in bf16 and log_decay in fp32, each once."""
    return tokens * (2 * (HQ * (D + V) + heads * (D + V)) + 4 * heads * gate_numbers(gate))


def backward_bytes(tokens: int, heads: int, gate: str | None) -> int:
    """The forward's inputs and do read once, dq, dk, dv and dlog_decay written once."""
    return tokens * (2 * (HQ * (2 * D + V) + 2 * heads * (D + V)) + 8 * heads * gate_numbers(gate))


def inputs(gate: str | None, *lead: int, heads: int = H):
    """q, k, v and log_decay (drawn as logsigmoid(randn) / 16); `lead` is [B, T], or [B] for a step."""
    q, k, v = (torch.randn(*lead, n, D, device="cuda", dtype=torch.bfloat16) for n in (HQ, heads, heads))
    if gate is None:
        return [q, k, v]
    shape = (*lead, heads) if gate == "scalar" else (*lead, heads, D)
    return [q, k, v, F.logsigmoid(torch.randn(shape, device="cuda")) / 16]


def worst_error(run: Callable, gate: str | None, heads: int) -> float:
    """Largest relative error of output and gradients on 333 tokens, in norm and by rows (against row + mean)."""
    args = [x.requires_grad_() for x in inputs(gate, 1, 333, heads=heads)]
    exact = [x.detach().double().requires_grad_() for x in args]
    got, want = run(*args)[0], gla(*exact, gate=gate, backend="naive")[0]
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


def measure(run: Callable, gate: str | None, batch: int, length: int, heads: int) -> dict:
    """Forward and forward+backward ms, if the result is right."""
    error = worst_error(run, gate, heads)
    if not error < TOLERANCE:
        return {"error": error}
    args = [x.requires_grad_() for x in inputs(gate, batch, length, heads=heads)]
    grad = torch.randn_like(args[0])
    with torch.no_grad():
        forward = median_ms(lambda: run(*args))
    both = median_ms(lambda: torch.autograd.grad(run(*args)[0], args, grad))
    return {"error": error, "forward_ms": round(forward, 4), "forward_backward_ms": round(both, 4)}


def measure_step(gate: str | None, batch: int, bandwidth: float) -> dict:
    """One decode step of one layer, timed as gsa's."""
    layers = layers_beyond_caches(batch * 4 * H * D * V)
    states = [torch.randn(batch, H, D, V, device="cuda") for _ in range(layers)]
    q, k, v, *rest = inputs(gate, batch)
    log_decay = rest[0] if rest else None
    exact: list = [x if x is None else x.double() for x in (q, k, v, log_decay, states[0])]
    want = gla_step(*exact, gate=gate, backend="naive")
    step: Callable = partial(gla_step, q, k, v, log_decay, gate=gate, backend="triton")
    error = ((step(states[0].clone()).double() - want).norm() / want.norm()).item()
    if not error < TOLERANCE:
        return {"batch": batch, "error": error}

    def steps() -> None:
        for state in states:
            step(state)

    ms = replay_ms(recorded(steps)) / layers
    moved = batch * (2 * 4 * H * D * V + 4 * H * gate_numbers(gate) + 2 * (HQ * D + H * D + H * V + HQ * V))
    share = moved / (ms / 1e3) / bandwidth
    return {"batch": batch, "error": error, "ms": round(ms, 5), "bytes": moved, "of_copy_bandwidth": round(share, 3)}


def run(output: Path, alone: bool = False) -> dict:
    """Checks, measures and writes gla.json into `output`; returns what it wrote. `alone`: without fla."""
    import triton

    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(int(time.time()))
    bandwidth = copy_bandwidth()
    record: dict = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "heads": {"HQ": HQ, "D": D, "V": V, "dtype": "bfloat16"},
        "copy_bandwidth_TB_s": round(bandwidth / 1e12, 3),
        "gates": [],
    }
    for gate in GATES:
        entry: dict = {"gate": gate, "rows": [], "steps": []}
        record["gates"].append(entry)
        for batch, length, heads in SHAPES:
            tokens = batch * length
            floor = forward_bytes(tokens, heads, gate) / bandwidth * 1e3
            whole = floor + backward_bytes(tokens, heads, gate) / bandwidth * 1e3
            row: dict = {"batch": batch, "length": length, "heads": heads}
            row["floor"] = {"forward_ms": round(floor, 4), "forward_backward_ms": round(whole, 4)}
            for name, candidate in candidates(gate, alone).items():
                try:
                    row[name] = measure(candidate, gate, batch, length, heads)
                except RuntimeError as error:
                    if name != "fla":
                        raise
                    row[name] = {"refused": str(error).split("\n")[0]}  # Triton versions that it knows to fail
            entry["rows"].append(row)
            print(json.dumps({"gate": gate} | row), flush=True)
        entry["steps"] = [measure_step(gate, batch, bandwidth) for batch in BATCHES]
        (output / "gla.json").write_text(json.dumps(record, indent=1) + "\n")  # what is cut off leaves what it had
    print(table(record))
    return record


def table(record: dict) -> str:
    """The record as Markdown."""
    columns = ("triton", "fla", "torch", "floor")
    lines = [
        f"{record['device']}, torch {record['torch']}, triton {record['triton']}, bf16, HQ {HQ}, D {D}, V {V}; "
        f"copy {record['copy_bandwidth_TB_s']} TB/s; ms, forward / forward + backward",
        "",
        "| gate | shape | H | ours | fla | torch | floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in record["gates"]:
        for row in entry["rows"]:
            cells = [str(entry["gate"]), f"{row['batch']} x {row['length']:,}", str(row["heads"])]
            for name in columns:
                told = row.get(name, {})
                if "forward_ms" in told:
                    cells.append(f"{told['forward_ms']:.2f} / {told['forward_backward_ms']:.2f}")
                else:
                    cells.append("check failed" if "error" in told else "refused" if told else "")
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| decode step, batch | gate | ms | of copy bandwidth |", "|---|---|---|---|"]
    for entry in record["gates"]:
        for step in entry["steps"]:
            told = f"{step['ms']:.4f} | {step['of_copy_bandwidth']:.2f}" if "ms" in step else "check failed |"
            lines.append(f"| {step['batch']} | {entry['gate']} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-gla"))
    parser.add_argument("--alone", action="store_true", help="without fla, whose tuning takes minutes")
    options = parser.parse_args()
    run(options.output, options.alone)
