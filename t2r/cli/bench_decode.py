"""t2r bench decode: first token, decoding and memory of a student beside its teacher, by context and batch."""

from pathlib import Path
from typing import Any

import click

from t2r.cli import bench_config
from t2r.cli.options import Lengths


@click.command("decode", short_help="Time decoding, student beside teacher.")
@click.argument("models", nargs=-1)
@click.option("--config", default="mistral-7b", show_default=True, help="Without MODELS: or a teacher's folder.")
@click.option("--mixer", default="gsa", show_default=True, help="With options: gsa:slots=128.")
@click.option("--layers", type=click.IntRange(1), help="Fewer layers than the configuration has.")
@click.option("--contexts", type=Lengths(), default="1K,8K,32K,128K", show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True, help="New tokens.")
@click.option("--largest-batch", type=click.IntRange(1), default=8192, show_default=True, help="To look for, on a GPU.")
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True, help="The fastest counts.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for all of it.")
def command(models: tuple[str, ...], output: Path | None, device: str, **options: Any) -> None:
    """Prefill and greedy decoding by `generate` at batch 1, and one decoding step by itself at batch 1 and at the
    largest power of two whose caches fit.

    MODELS are folders or Hub ids; without any, a teacher of --config and its student get random weights on the device.
    A step by itself is a CUDA graph, replayed: for the teacher too, whose `generate` has none, on a cache that stands
    at its length and is not copied to grow. Peak memory is that of the prompt and the decoding, beside the weights.
    Where a cache does not grow from one context to the next, many sequences are measured once. "launched" is `generate`
    without the student's own graph, at the first context.
    """
    import json

    import torch

    from t2r.model import StudentCache, load, pick_device
    from t2r.model.decoding import can_record
    from t2r.publish import write_whole
    from t2r.train.speed import random_model
    from t2r_evals.provenance import machine, versions
    from t2r_evals.speed import empty, measure_speed
    from t2r_evals.speed_step import measure_largest_step, measure_step

    target = torch.device(pick_device(device))
    dtype = getattr(torch, options["dtype"])
    configs = {} if models else _configs(options)
    contexts = options["contexts"]
    record: dict[str, Any] = {"options": options, "machine": machine(), "versions": versions(), "rows": []}
    click.echo(f"{machine().get('GPU', 'CPU')}, torch {torch.__version__}")
    click.echo(
        "model    context  batch  first token  prefill/s  generate/s    one step     steps/s  cache MiB  peak GiB"
    )
    spoken = {"decode_tokens": options["tokens"], "repeats": options["repeats"]}
    for name in models or configs:
        model = (
            load(name, dtype=dtype, device=str(target))[0]
            if models
            else random_model(configs[name], dtype, target).eval()
        )
        recorded = hasattr(model.config, "mixers") and can_record(model, StudentCache(model.config))
        held = 0
        for context in contexts:
            points: list[dict[str, Any]] = []
            try:
                if recorded and context == contexts[0]:
                    (point,) = measure_speed(model, [context], disable_compile=True, **spoken)
                    points.append(point.model_dump() | {"launched": True})
                (point,) = measure_speed(model, [context], **spoken)
                alone = measure_step(model, context, 1)
                points.append(point.model_dump() | alone.model_dump())
                empty(target)
                if target.type == "cuda" and options["largest_batch"] > 1 and alone.state_bytes != held:
                    held = alone.state_bytes
                    points.append(measure_largest_step(model, context, options["largest_batch"]).model_dump())
            except torch.OutOfMemoryError:
                click.echo(f"{Path(name).name:8} {context:7,}  does not fit")
            for row in points:
                record["rows"].append({"model": Path(name).name, **row})
                click.echo(_line(record["rows"][-1]))
            empty(target)
            if output is not None:
                write_whole(output, json.dumps(record, indent=1) + "\n")
        del model
        empty(target)


def _line(row: dict[str, Any]) -> str:
    said = " " * 35
    if "first_token_seconds" in row:
        said = (
            f"{1000 * row['first_token_seconds']:9,.0f} ms {row['prefill_tokens_per_second']:10,.0f} "
            f"{row['decode_tokens_per_second']:11,.1f}"
        )
    alone = f"{'launched':>23}"
    if "step_seconds" in row:
        alone = f"{1000 * row['step_seconds']:8.2f} ms {row['tokens_per_second']:11,.1f}"
    peak = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**30:9.2f}"
    return (
        f"{row['model']:8} {row['context']:7,} {row['batch']:6} {said} {alone} "
        f"{row['state_bytes'] / 2**20:10,.1f} {peak}"
    )


def _configs(options: dict[str, Any]) -> dict[str, Any]:
    """Of a teacher and its student."""
    from t2r.model import assign_mixers, parse_options, student_config

    host = bench_config.host(options["config"], options["layers"])
    mixers = assign_mixers(parse_options(bench_config.mixer(options["mixer"])), host.num_hidden_layers)
    return {"teacher": host, "student": student_config(host, mixers)}
