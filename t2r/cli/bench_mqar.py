"""t2r bench mqar: accuracy of small models on multi-query associative recall, by mixer and width."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from t2r.cli import bench_config
from t2r.cli.options import Finite

if TYPE_CHECKING:
    from t2r_evals.mqar import MqarOptions, MqarResult


@click.command("mqar", short_help="Train small models on associative recall.")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for mqar.json, .md and .svg and curves.svg.",
)
@click.option("--mixers", default="softmax gsa:style=paper", show_default=True, help="With options, a space apart.")
@click.option("--widths", default="64,128,256,512", show_default=True)
@click.option("--heads", type=click.IntRange(min=1), help="Of every mixer; default: one per 64 of width.")
@click.option("--lr", "learning_rates", default="", help="Learning rates; default: the paper's four.")
@click.option("--length", type=int, default=512, show_default=True)
@click.option("--pairs", type=int, default=64, show_default=True)
@click.option("--vocabulary", type=int, default=8192, show_default=True)
@click.option("--examples", "train_examples", type=int, default=100_000, show_default=True)
@click.option("--epochs", type=int, default=64, show_default=True)
@click.option(
    "--minutes",
    type=Finite(0, min_open=True),
    help="Per model; anneals and ends there if that is before the last epoch.",
)
@click.option("--batch-size", type=int, default=256, show_default=True)
@click.option(
    "--short-conv",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Taps of a causal convolution before every mixer, softmax too; 0: none.",
)
@click.option("--curriculum", default="", help="Lessons before the setting, length:pairs; such as 64:4,128:16,256:32.")
@click.option("--warmup", type=int, default=0, show_default=True, help="Steps in which the learning rate rises.")
@click.option("--random-filler", is_flag=True, help="Random tokens where nothing is asked; otherwise token 0.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Models trained at a time.")
@click.option("--compile", is_flag=True, help="Through torch.compile; pays on a GPU.")
@click.option("--device", default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def command(
    output: Path,
    mixers: str,
    widths: str,
    heads: int | None,
    learning_rates: str,
    short_conv: int,
    curriculum: str,
    jobs: int,
    device: str,
    **settings: Any,
) -> None:
    """Train models of two layers from scratch and write accuracy against width, the best learning rate of each.

    The defaults are the hardest setting of the GSA paper (arXiv 2409.07146): 512 tokens, 64 pairs. Every model is a
    Mistral host, its attention replaced; "softmax" is the host's own. A short convolution lets a value see its key at
    once, as in Zoology's models; without one the first layer has to learn it. A curriculum of easier settings spares
    recurrent mixers the long plateau of guessing at the start. Files are written anew after every model.

    Example: t2r bench mqar --output runs/mqar --widths 128 --short-conv 4 --curriculum 64:4,128:16,256:32
    --mixers "softmax gsa:style=paper gla"
    """
    import functools

    from pydantic import ValidationError

    from t2r.errors import InputError
    from t2r.model import pick_device
    from t2r_evals.mqar import PAPER_LEARNING_RATES, MqarOptions, sweep

    try:
        options = MqarOptions(**settings, curriculum=_lessons(curriculum))
        sizes = [int(width) for width in widths.split(",")]
        rates = [float(rate) for rate in learning_rates.split(",") if rate] or list(PAPER_LEARNING_RATES)
    except ValidationError as error:
        raise InputError(f"mqar: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise InputError(f"mqar: {error}") from None
    specs = mixers.split()
    for spec in specs:
        for width in sizes:
            build(spec, width, options.vocabulary, options.length, heads=heads, check_only=True)
    model: dict[str, Any] = {
        "vocabulary": options.vocabulary,
        "length": options.length,
        "heads": heads,
        "short_conv": short_conv,
    }
    output.mkdir(parents=True, exist_ok=True)
    results: list[MqarResult] = []
    for result in sweep(
        functools.partial(build, **model),
        specs,
        sizes,
        options,
        learning_rates=rates,
        device=pick_device(device),
        jobs=jobs,
    ):
        results.append(result)
        results.sort(key=lambda r: (specs.index(r.mixer), r.width, r.lr))
        table = _write(output, results, options, {"heads": heads, "short_conv": short_conv}, specs, sizes)
    click.echo(table)


def _write(
    output: Path,
    results: "list[MqarResult]",
    options: "MqarOptions",
    model: dict[str, int | None],
    specs: list[str],
    widths: list[int],
) -> str:
    """The record, the tables and the figures of the models so far; returns the table of accuracies."""
    import json

    from t2r_evals.mqar import best_results, draw, draw_curves
    from t2r_evals.provenance import machine, versions
    from t2r_evals.report.svg import standalone

    best = best_results(results)
    record = {
        "options": {**options.model_dump(), **model},
        "best": [result.model_dump() for result in best],
        "results": [result.model_dump() for result in results],
        "machine": machine(),
        "versions": versions(),
    }
    table = accuracy_table(best, specs, widths)
    (output / "mqar.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / "mqar.svg").write_text(standalone(draw(best, options)))
    (output / "curves.svg").write_text(standalone(draw_curves(best, options)))
    (output / "mqar.md").write_text(f"{table}\n\n{trial_table(results)}\n")
    return table


def _lessons(curriculum: str) -> list[tuple[int, int]]:
    """ "64:4,128:16" as [(64, 4), (128, 16)]."""
    lessons = [lesson.split(":") for lesson in curriculum.split(",") if lesson]
    if any(len(lesson) != 2 for lesson in lessons):
        raise ValueError(f"curriculum: {curriculum!r} is not length:pairs, separated by commas")
    return [(int(length), int(pairs)) for length, pairs in lessons]


def accuracy_table(best: "Sequence[MqarResult]", specs: list[str], widths: list[int]) -> str:
    """Accuracy in % by mixer and width, in Markdown."""
    lines = ["| mixer | " + " | ".join(f"width {width}" for width in widths) + " |", "|---|" + "---:|" * len(widths)]
    accuracies = {(result.mixer, result.width): f"{100 * result.accuracy:.1f}" for result in best}
    for spec in specs:
        lines.append(f"| {spec} | " + " | ".join(accuracies.get((spec, width), "") for width in widths) + " |")
    return "\n".join(lines)


def trial_table(results: "Sequence[MqarResult]") -> str:
    """Every model that was trained, in Markdown."""
    lines = [
        "| mixer | width | parameters | learning rate | epochs | minutes | accuracy, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        lines.append(
            f"| {r.mixer} | {r.width} | {r.parameters:,} | {r.lr:.2g} | {len(r.curve)} | {r.seconds / 60:.1f} "
            f"| {100 * r.accuracy:.1f} |"
        )
    return "\n".join(lines)


def build(
    spec: str,
    width: int,
    vocabulary: int,
    length: int,
    *,
    heads: int | None = None,
    short_conv: int = 0,
    check_only: bool = False,
) -> Any:
    """An untrained model of two layers with the mixer that `spec` ("name:key=value,...") describes, behind a causal
    convolution of `short_conv` taps.

    Raises:
        InputError: an unknown mixer or option, or a width that does not divide into the heads.
    """
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    from t2r.errors import InputError
    from t2r.model import assign_mixers, parse_options, student_config

    heads = heads or max(1, width // 64)
    if width % heads or (width // heads) % 2:
        raise InputError(f"mqar: width {width} does not divide into {heads} heads of an even size")
    host = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=length,
        # Of the order of 1 / sqrt(inputs). With transformers' 0.02 all gates of so narrow a model start alike, so all
        # slots hold the same, and GSA needs many times the steps to tell them apart.
        initializer_range=width**-0.5,
        sliding_window=None,
        tie_word_embeddings=True,
    )
    config: Any = host
    if spec != "softmax":
        options = parse_options(bench_config.mixer(spec))
        config = student_config(host, assign_mixers(options, 2))
    with torch.device("meta" if check_only else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    if short_conv and not check_only:
        from t2r_evals.mqar import add_short_convolutions

        add_short_convolutions(model, short_conv)
    return model
