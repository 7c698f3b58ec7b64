"""`t2r bench`: times on this machine, beside the peers that are installed."""

import importlib.util
from pathlib import Path

import click

from t2r.cli import bench_decode, bench_mqar, bench_train


@click.group(help="Time kernels, decoding and training on this machine.")
def command() -> None:
    pass


command.add_command(bench_decode.command)
command.add_command(bench_mqar.command)
command.add_command(bench_train.command)
bench = command


def _benchmark(name: str):
    """The module kernels/benchmarks/NAME.py of this checkout; benchmarks are no part of the wheel."""
    path = Path(__file__).parents[2] / "kernels" / "benchmarks" / f"{name}.py"
    if not path.is_file():
        raise click.UsageError(
            f"no benchmarks beside this installation ({path} is missing); run from a checkout of t2r"
        )
    spec = importlib.util.spec_from_file_location(f"t2r_benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@command.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/bench-kernels"),
    show_default=True,
    help="Folder for gsa.json and gsa.svg.",
)
def kernels(output: Path) -> None:
    """gsa against scaled_dot_product_attention, and flash-linear-attention where it is installed; needs a CUDA GPU."""
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError("t2r bench kernels needs a CUDA GPU; torch sees none")
    _benchmark("gsa").run(output)
