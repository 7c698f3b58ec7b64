"""`t2r bench`: times on this machine, beside the peers that are installed."""

import importlib
import sys
from pathlib import Path

import click

from t2r.cli import bench_decode, bench_mqar, bench_train
from t2r.resources import benchmarks_root


@click.group(help="Time kernels, decoding and training on this machine.")
def command() -> None:
    pass


command.add_command(bench_decode.command)
command.add_command(bench_mqar.command)
command.add_command(bench_train.command)
bench = command


@command.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/bench-kernels"),
    show_default=True,
    help="Folder for OPERATION.json and, of gsa, gsa.svg.",
)
@click.option("--operation", type=click.Choice(["gsa", "gla"]), default="gsa", show_default=True)
def kernels(output: Path, operation: str) -> None:
    """Check a kernel, then time it; needs a CUDA GPU. gsa stands beside scaled_dot_product_attention and, where it is
    installed, flash-linear-attention; gla beside its torch path."""
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError("t2r bench kernels needs a CUDA GPU; torch sees none")
    sys.path.insert(0, str(benchmarks_root()))  # scripts, one beside the other, in a checkout and in a wheel
    importlib.import_module(operation).run(output)
