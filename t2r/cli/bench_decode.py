"""t2r bench decode: decoding of a student beside its teacher, by context and batch."""

from pathlib import Path
from typing import Any

import click

from t2r.cli import bench_config


@click.command("decode", short_help="Time decoding, student beside teacher.")
@click.argument("models", nargs=-1)
@click.option("--config", default="mistral-7b", show_default=True, help="Without MODELS: or a teacher's folder.")
@click.option("--mixer", default="gsa", show_default=True, help="With options: gsa:slots=128.")
@click.option("--layers", type=click.IntRange(1), help="Fewer layers than the configuration has.")
@click.option("--contexts", default="2048,8192,32768", show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="New tokens.")
@click.option("--largest-batch", type=click.IntRange(1), default=1, show_default=True, help="Doubled while it fits.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="The fastest counts.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for all of it.")
def command(models: tuple[str, ...], output: Path | None, device: str, **options: Any) -> None:
    """Tokens/s of greedy decoding by `generate`, time to the first token, and memory, at each context.

    MODELS are folders or Hub ids; without any, a teacher of --config and its student get random weights on the device.
    """
    import gc
    import json

    import torch

    from t2r.model import load
    from t2r.publish import write_whole
    from t2r.train.speed import random_model
    from t2r_evals.provenance import machine, versions
    from t2r_evals.speed import measure_speed

    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    configs = {} if models else _configs(options)
    contexts = [int(length) for length in options["contexts"].split(",")]
    record: dict[str, Any] = {"options": options, "machine": machine(), "versions": versions(), "models": {}}
    click.echo(f"{machine().get('GPU', 'CPU')}, torch {torch.__version__}")
    click.echo("model    context  batch  decode tokens/s  first token    cache MiB   peak GiB")
    for name in models or configs:
        if models:
            model = load(name, dtype=getattr(torch, options["dtype"]), device=str(target))[0]
        else:
            model = random_model(configs[name], getattr(torch, options["dtype"]), target).eval()
        points = measure_speed(
            model,
            contexts,
            decode_tokens=options["tokens"],
            largest_batch=options["largest_batch"],
            repeats=options["repeats"],
        )
        record["models"][name] = [point.model_dump() for point in points]
        for point in points:
            peak = "" if point.peak_bytes is None else f"{point.peak_bytes / 2**30:.2f}"
            click.echo(
                f"{Path(name).name:8} {point.context:7,} {point.batch:6} {point.decode_tokens_per_second:16,.1f} "
                f"{1000 * point.first_token_seconds:9,.0f} ms {point.state_bytes / 2**20:12,.1f} {peak:>10}"
            )
        del model
        gc.collect()
        if target.type == "cuda":
            torch.cuda.empty_cache()
    if output is not None:
        write_whole(output, json.dumps(record, indent=1) + "\n")


def _configs(options: dict[str, Any]) -> dict[str, Any]:
    """Of a teacher and its student."""
    from t2r.model import assign_mixers, parse_options, student_config

    host = bench_config.host(options["config"], options["layers"])
    mixers = assign_mixers(parse_options(bench_config.mixer(options["mixer"])), host.num_hidden_layers)
    return {"teacher": host, "student": student_config(host, mixers)}
