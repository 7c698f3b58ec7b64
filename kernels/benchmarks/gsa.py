"""Times gsa against its peers on one GPU: `python kernels/benchmarks/gsa.py --output DIR` or `t2r bench kernels`.

Prints a table, writes `gsa.json` and `gsa.svg`; with `--slots 64,128,256` it only prints gsa's times by the number of
slots. A kernel whose result does not agree with the float64 definition in the same run gets no time. Peers are
PyTorch's scaled_dot_product_attention on the same heads and, where it is installed, flash-linear-attention's chunk_gsa
on the same inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from t2r_kernels import gsa, gsa_step

HQ, H, D, M, LAYERS = 32, 8, 128, 64, 32  # Mistral-7B's heads and layers, 64 slots
SHAPES = ((1, 2048), (16, 2048), (4, 8192), (1, 32768))  # first the one that hangs on the host
SHORT = 4096  # tokens of a call, up to which it is also timed as a CUDA graph, apart from the host
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOLERANCE = 2e-2  # of bf16 in one draw: PyTorch's attention was seen at 1.7e-2
# Matrix products of one token and key/value head, as counted in kernels/README.md.
FORWARD_FLOP = (HQ // H) * 4 * D * M + 4 * D * M + 2 * (HQ // H) * 16 * (2 * D + 2 * M)
BACKWARD_FLOP = FORWARD_FLOP * 3


def forward_bytes(tokens: int) -> int:
    """q, k, v and o in bf16 and log_alpha in fp32, each once."""
    return tokens * (2 * (2 * HQ * D + 2 * H * D) + 4 * H * M)


def backward_bytes(tokens: int) -> int:
    """The forward's inputs and do read once, dq, dk, dv and dlog_alpha written once."""
    return tokens * (2 * (3 * HQ * D + 4 * H * D) + 8 * H * M)


def inputs(batch: int, length: int, slots: int = M):
    """q, k, v, log_alpha (drawn as logsigmoid(randn) / 8) and an upstream gradient, in layout [B, T, H, D]."""
    q, k, v, grad = (
        torch.randn(batch, length, heads, D, device="cuda", dtype=torch.bfloat16) for heads in (HQ, H, H, HQ)
    )
    log_alpha = F.logsigmoid(torch.randn(batch, length, H, slots, device="cuda")) / 8
    for x in (q, k, v, log_alpha):
        x.requires_grad_(True)
    return (q, k, v, log_alpha), grad


def ours(q, k, v, log_alpha):
    return gsa(q, k, v, log_alpha, backend="triton")[0]


def sdpa(q, k, v, log_alpha):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def fla_gsa(q, k, v, log_alpha):
    from fla.ops.gsa import chunk_gsa

    write = -torch.expm1(log_alpha)
    return chunk_gsa(q, k, v, write.to(q.dtype), log_alpha, scale=D**-0.5)[0]


def softmax_attention64(q, k, v, log_alpha):
    """What `sdpa` is to compute, in float64."""
    return sdpa(q, k, v, log_alpha)


def gsa64(q, k, v, log_alpha):
    return gsa(q, k, v, log_alpha, backend="naive")[0]


def worst_error(fn: Callable, reference: Callable, slots: int = M) -> float:
    """Largest relative error of output and gradients on 333 tokens, in norm and by rows (against row + mean)."""
    args, grad = inputs(1, 333, slots)
    exact = [x.detach().double().requires_grad_() for x in args]
    want = reference(*exact)
    used = [
        i for i, x in enumerate(torch.autograd.grad(want, exact, grad.double(), allow_unused=True)) if x is not None
    ]
    want_all = [want, *torch.autograd.grad(reference(*exact), [exact[i] for i in used], grad.double())]
    got = fn(*args)
    got_all = [got, *torch.autograd.grad(got, [args[i] for i in used], grad)]
    worst = 0.0
    for x, y in zip(got_all, want_all, strict=True):
        error, size = (x.double() - y).norm(dim=-1), y.norm(dim=-1)
        rows = (error / (size + size.square().mean().sqrt())).max()
        worst = max(worst, (error.norm() / size.norm()).item(), rows.item())
    return worst if worst == worst else float("inf")


def median_ms(fn: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(fn, warmup=50, rep=200, return_mode="median")


def recorded(fn: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """fn as a CUDA graph, which is replayed without its Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph


def measure(fn: Callable, batch: int, length: int, slots: int = M) -> dict:
    """Forward and forward+backward ms; MiB held and at the peak after the forward beyond its inputs."""
    args, grad = inputs(batch, length, slots)

    def gradients() -> object:
        return torch.autograd.grad(fn(*args), args, grad, allow_unused=True)

    with torch.no_grad():
        forward = median_ms(lambda: fn(*args))
    both = median_ms(gradients)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = fn(*args)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    del output
    times = {
        "forward_ms": round(forward, 4),
        "forward_backward_ms": round(both, 4),
        "held_MiB": round(held / 2**20, 1),
        "peak_MiB": round(peak / 2**20, 1),
    }
    if batch * length <= SHORT and fn in (ours, sdpa):
        with torch.no_grad():
            times["forward_graph_ms"] = round(median_ms(recorded(lambda: fn(*args)).replay), 4)
        times["forward_backward_graph_ms"] = round(median_ms(recorded(gradients).replay), 4)
    return times


def by_slots(slots: tuple[int, ...]) -> str:
    """Times of gsa at 8 x 2,048 tokens with so many slots in every head, as Markdown."""
    lines = ["| slots | forward, ms | forward + backward, ms |", "|---|---|---|"]
    for number in slots:
        error = worst_error(ours, gsa64, number)
        if not error < TOLERANCE:
            lines.append(f"| {number:,} | check failed (error {error:.1e}, allowed {TOLERANCE}) | |")
            continue
        times = measure(ours, 8, 2048, number)
        lines.append(f"| {number:,} | {times['forward_ms']:.3f} | {times['forward_backward_ms']:.3f} |")
    return "\n".join(lines)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on this device."""
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.numel() / median_ms(lambda: y.copy_(x)) * 1e3


def product_rate() -> float:
    """FLOP/s of a large bf16 matrix product on this device."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: x @ y) * 1e3


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """One replay among ten that follow each other, as the steps of decoding do."""

    def ten() -> None:
        for _ in range(10):
            graph.replay()

    return median_ms(ten) / 10


def layers_beyond_caches(state_bytes: int) -> int:
    """So many layers that no cache holds their states."""
    return max(LAYERS, 2**29 // state_bytes)


def measure_step(batch: int, bandwidth: float) -> dict:
    """One decode step of one layer, from a CUDA graph over so many layers that no cache holds their states."""
    layers = layers_beyond_caches(batch * 2 * 4 * H * M * D)
    states = [tuple(torch.randn(batch, H, M, D, device="cuda") for _ in range(2)) for _ in range(layers)]
    q, k, v = (torch.randn(batch, heads, D, device="cuda", dtype=torch.bfloat16) for heads in (HQ, H, H))
    log_alpha = F.logsigmoid(torch.randn(batch, H, M, device="cuda"))
    want = gsa_step(q.double(), k.double(), v.double(), log_alpha.double(), tuple(s.double() for s in states[0]))
    got = gsa_step(q, k, v, log_alpha, tuple(s.clone() for s in states[0]), backend="triton")
    error = ((got.double() - want).norm() / want.norm()).item()
    if not error < TOLERANCE:
        return {"batch": batch, "error": error}

    def steps() -> None:
        for state in states:
            gsa_step(q, k, v, log_alpha, state, backend="triton")

    ms = replay_ms(recorded(steps)) / layers
    moved = batch * (2 * 4 * 2 * H * M * D + 4 * H * M + 2 * (2 * HQ * D + 2 * H * D))
    return {
        "batch": batch,
        "error": error,
        "ms": round(ms, 5),
        "bytes": moved,
        "of_copy_bandwidth": round(moved / (ms / 1e3) / bandwidth, 3),
    }


NEW_PROCESS = """
import time; start = time.perf_counter()
import torch; imported = time.perf_counter()
import sys; sys.path.insert(0, sys.argv[1])
import gsa
args, _grad = gsa.inputs(1, 2048); torch.cuda.synchronize(); ready = time.perf_counter()
gsa.ours(*args).sum().backward(); torch.cuda.synchronize()
print(imported - start, ready - imported, time.perf_counter() - ready)
"""


def new_process(kernels: str) -> dict:
    """Seconds of a new process up to its first gradients, when compiled kernels are kept in the folder `kernels`. Of a
    scalar, as in training: given upstream gradients, torch imports sympy to compare their shapes."""
    command = [sys.executable, "-c", NEW_PROCESS, str(Path(__file__).parent)]
    start = time.perf_counter()
    ran = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": kernels}
    )
    whole = time.perf_counter() - start
    torch_s, cuda_s, first_s = (round(float(x), 2) for x in ran.stdout.split()[-3:])
    return {"whole_s": round(whole, 2), "import_torch_s": torch_s, "cuda_and_inputs_s": cuda_s, "gradients_s": first_s}


def run(output: Path, lengths: tuple[int, ...] = LENGTHS, alone: bool = False) -> dict:
    """Checks, measures and writes gsa.json and gsa.svg into `output`; returns what it wrote. `alone`: without peers."""
    import triton

    torch.manual_seed(int(time.time()))
    with tempfile.TemporaryDirectory() as nothing_compiled:
        first_process, second_process = (new_process(nothing_compiled) for _ in range(2))
    kernels: dict[str, tuple[Callable, Callable]] = {"ours": (ours, gsa64)}
    if not alone:
        kernels["sdpa"] = (sdpa, softmax_attention64)
        if importlib.util.find_spec("fla") is not None:
            kernels["fla"] = (fla_gsa, gsa64)
    bandwidth, rate = copy_bandwidth(), product_rate()
    record: dict = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "heads": {"HQ": HQ, "H": H, "D": D, "M": M, "dtype": "bfloat16"},
        "copy_bandwidth_TB_s": round(bandwidth / 1e12, 3),
        "bf16_product_TFLOP_s": round(rate / 1e12, 1),
        "first_process": first_process,
        "second_process": second_process,
        "errors": {name: worst_error(fn, reference) for name, (fn, reference) in kernels.items()},
        "rows": [],
        "lengths": [],
    }
    passed = [name for name in kernels if record["errors"][name] < TOLERANCE]
    for batch, length in SHAPES:
        tokens = batch * length
        floor = max(forward_bytes(tokens) / bandwidth, FORWARD_FLOP * tokens * H / rate) * 1e3
        both = floor + max(backward_bytes(tokens) / bandwidth, BACKWARD_FLOP * tokens * H / rate) * 1e3
        row = {"batch": batch, "length": length, "floor_forward_ms": round(floor, 4), "floor_ms": round(both, 4)}
        record["rows"].append(row | {name: measure(kernels[name][0], batch, length) for name in passed})
    for length in lengths:
        batch = max(1, 32768 // length)
        shape = {"batch": batch, "length": length}
        record["lengths"].append(shape | {name: measure(kernels[name][0], batch, length) for name in passed})
    record["steps"] = [measure_step(batch, bandwidth) for batch in (1, 4, 16, 32, 64, 128, 256)]
    output.mkdir(parents=True, exist_ok=True)
    (output / "gsa.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, output / "gsa.svg")
    print(table(record))
    return record


def table(record: dict) -> str:
    """The record as Markdown."""
    names = [name for name in record["errors"] if all(name in row for row in record["rows"])]
    peers = [name for name in names if name != "ours"]
    lines = [
        f"{record['device']}, torch {record['torch']}, triton {record['triton']}, bf16, HQ {HQ}, H {H}, D {D}, M {M}; "
        f"copy {record['copy_bandwidth_TB_s']} TB/s, matrix product {record['bf16_product_TFLOP_s']} TFLOP/s; "
        f"first gradients with nothing compiled {record['first_process']['gradients_s']} s, of a second process "
        f"{record['second_process']['gradients_s']} s ({record['second_process']['whole_s']} s from its start)",
        "",
    ]
    for name, error in record["errors"].items():
        if name not in names:
            lines.append(f"{name}: no time, because its check failed (error {error:.1e}, allowed {TOLERANCE})")
    if "ours" not in names:
        return "\n".join(lines)
    columns = ["", *names, *(f"{peer} / ours" for peer in peers), "floor", "floor / ours"]
    lines += [" | ".join(("", *columns, "")).strip(), "|" + "---|" * len(columns)]
    for row in record["rows"]:
        for key, floor, title in (
            ("forward_ms", "floor_forward_ms", "forward"),
            ("forward_backward_ms", "floor_ms", "forward + backward"),
        ):
            mine = row["ours"][key]
            cells = [f"{title}, {row['batch']} x {row['length']:,}, ms", *(f"{row[name][key]:.3f}" for name in names)]
            cells += [f"{row[peer][key] / mine:.2f}" for peer in peers]
            lines.append("| " + " | ".join([*cells, f"{row[floor]:.3f}", f"{row[floor] / mine:.2f}"]) + " |")
        for key, title in (("forward_graph_ms", "forward"), ("forward_backward_graph_ms", "forward + backward")):
            if key in row["ours"]:
                cells = [f"{title}, {row['batch']} x {row['length']:,}, as a CUDA graph, ms"]
                cells += [f"{row[name][key]:.3f}" if key in row[name] else "" for name in names]
                cells += [f"{row[peer][key] / row['ours'][key]:.2f}" if key in row[peer] else "" for peer in peers]
                lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
        for key, title in (("held_MiB", "held"), ("peak_MiB", "peak")):
            cells = [f"{title} after the forward, MiB", *(f"{row[name][key]:,.0f}" for name in names)]
            lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    lines += ["", "| decode step, batch | ms | of copy bandwidth |", "|---|---|---|"]
    for step in record["steps"]:
        told = f"{step['ms']:.4f} | {step['of_copy_bandwidth']:.2f}" if "ms" in step else "check failed |"
        lines.append(f"| {step['batch']} | {told} |")
    return "\n".join(lines)


def plot(record: dict, path: Path) -> None:
    """Forward and forward+backward against length, 32,768 tokens per call."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axis, key, title in zip(
        axes, ("forward_ms", "forward_backward_ms"), ("forward", "forward + backward"), strict=True
    ):
        for name in record["errors"]:
            points = [(row["length"], row[name][key]) for row in record["lengths"] if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens per sequence, 32,768 per call", ylabel="ms", title=title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-kernels"))
    parser.add_argument(
        "--lengths", type=lambda text: tuple(map(int, text.split(","))), default=LENGTHS, help="of the plot"
    )
    parser.add_argument("--alone", action="store_true", help="without peers, whose tuning takes minutes")
    parser.add_argument("--slots", type=lambda text: tuple(map(int, text.split(","))), help="print times by slots")
    options = parser.parse_args()
    if options.slots:
        print(by_slots(options.slots))
    else:
        run(options.output, options.lengths, options.alone)
