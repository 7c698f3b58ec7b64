"""t2r bench train: tokens/s, MFU and memory of the training stages, from a configuration alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from t2r.cli import bench_config
from t2r.cli.options import Lengths, Names


@click.command("train", short_help="Time the training stages on random weights.")
@click.option("--config", "config", default="mistral-7b", show_default=True, help="Or a teacher's folder.")
@click.option("--mixer", default="gsa", show_default=True, help="With options: gsa:slots=128.")
@click.option("--layers", type=click.IntRange(1), help="Fewer layers than the configuration has.")
@click.option(
    "--stages", type=Names("finetune", "distill", "align"), default="finetune,distill,align", show_default=True
)
@click.option(
    "--train", "trained", type=Names("full", "lora"), default="full,lora", show_default=True, help="align has no LoRA."
)
@click.option("--lengths", type=Lengths(), default="2K,8K", show_default=True, help="Tokens per row.")
@click.option("--micro-tokens", type=click.IntRange(1), default=16384, show_default=True, help="Halved until it fits.")
@click.option("--accumulate", type=click.IntRange(1), default=2, show_default=True, help="Micro-batches per step.")
@click.option("--checkpointing", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--document", type=click.IntRange(1), default=1024, show_default=True, help="Tokens per document.")
@click.option("--top-k", type=int, default=256, show_default=True, help="Of distill; 0: the whole vocabulary.")
@click.option("--fused/--unfused", default=True, show_default=True, help="liger-kernel, where it is installed.")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--gather", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of FSDP2.")
@click.option("--warmup", type=click.IntRange(1), default=2, show_default=True, help="Steps before the clock starts.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps that are timed.")
@click.option("--profile", type=click.Path(path_type=Path), help="Folder for the operations of one step of each row.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for all of it.")
def command(config: str, output: Path | None, profile: Path | None, **options: Any) -> None:
    """Tokens/s, MFU and peak memory of each stage, with full parameters and LoRA, at each sequence length.

    Teacher and student get random weights on the device; no model is read or written. Under torchrun the processes
    share them by FSDP2. MFU is the model's FLOPs (recomputation not counted; t2r/train/flops.py has the formula) over
    what an 8192 x 8192 x 8192 bfloat16 matrix product reaches in the same run. A row that does not fit is tried with
    half the micro-batch, down to one row.

    "auto" checkpoints activations with full parameters and not with LoRA or align.
    """
    import json

    import torch

    from t2r.publish import write_whole
    from t2r.train import processes
    from t2r.train.speed import matrix_rate
    from t2r_evals.provenance import machine, versions

    host = bench_config.host(config, options["layers"])
    state = processes()
    tell = click.echo if state.is_main_process else lambda *args, **kwargs: None
    rate = matrix_rate(state.device, 8192 if state.device.type == "cuda" else 1024)
    record: dict[str, Any] = {
        "config": host.to_diff_dict(),
        "options": {**options, "config": config},
        "processes": state.num_processes,
        "matrix_flops_per_second": rate,
        "machine": machine(),
        "versions": versions(),
        "rows": [],
    }
    tell(f"{state.num_processes} x {machine().get('GPU', 'CPU')}, bf16 matrix product {rate / 1e12:.0f} TFLOP/s")
    tell("stage     train  tokens  micro  ckpt   tokens/s    MFU   peak GiB  MFLOP/token")
    for row in _rows(options):
        for result in _measure(host, row, options, state, profile):
            if "tokens_per_second" in result:
                result["mfu"] = result["flops_per_second_and_device"] / rate
            record["rows"].append(result)
            tell(_line(result))
        if output is not None and state.is_main_process:
            write_whole(output, json.dumps(record, indent=1) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _rows(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for length in options["lengths"]:
        for stage in options["stages"]:
            for trained in options["trained"]:
                if (stage, trained) != ("align", "lora"):
                    auto = trained == "full" and stage != "align"
                    checkpointing = auto if options["checkpointing"] == "auto" else options["checkpointing"] == "on"
                    yield {"stage": stage, "train": trained, "length": length, "gradient_checkpointing": checkpointing}


def _measure(
    host: Any, row: dict[str, Any], options: dict[str, Any], state: Any, profile: Path | None
) -> Iterator[dict[str, Any]]:
    """The row's result, after one for every micro-batch that did not fit."""
    import torch

    from t2r.train.speed import measure_stage
    from t2r_evals.speed import empty

    micro = max(1, options["micro_tokens"] // row["length"])
    while micro:
        steps = options["warmup"] + options["steps"] + (profile is not None)
        recipe = _recipe(row, micro, steps, options, state.num_processes)
        if profile is not None:
            profile.mkdir(parents=True, exist_ok=True)
        file = None if profile is None else profile / f"{row['stage']}-{row['train']}-{row['length']}.txt"
        tried = {**row, "micro_batch_size": micro, "accumulate": options["accumulate"], "fused": options["fused"]}
        try:
            result = measure_stage(host, recipe, warmup=options["warmup"], document=options["document"], profile=file)
        except torch.OutOfMemoryError as error:
            result = {"out_of_memory": str(error).split(". ")[0]}
        empty(state.device)
        if state.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(state.device)
        yield {**tried, **result}
        micro = micro // 2 if "out_of_memory" in result else 0


def _recipe(row: dict[str, Any], micro: int, steps: int, options: dict[str, Any], number: int) -> Any:
    import json

    from t2r.recipe import parse_recipe

    batch = micro * row["length"] * options["accumulate"] * number
    stage: dict[str, Any] = {
        "kind": row["stage"],
        "tokens": batch * steps,
        "sequence_length": row["length"],
        "batch_tokens": batch,
        "micro_batch_size": micro,
        "lr": 1e-5,
        "gradient_checkpointing": row["gradient_checkpointing"],
        "precision": options["precision"],
        "fused": options["fused"],
        "log_every": 1,
    }
    if row["stage"] == "distill":
        stage |= {"teacher_top_k": options["top_k"] or None, "ce_weight": 0.1}
    if row["train"] == "lora":
        stage["adapter"] = {"kind": "lora", "r": 16, "alpha": 32.0}
    content = {
        "model": {"source": "random", "dtype": "bfloat16" if options["precision"] == "bf16" else "float32"},
        "mixer": bench_config.mixer(options["mixer"]),
        "data": {"source": "random"},
        "stages": [stage],
        "distributed": {"fsdp": row["train"] == "full", "gather": options["gather"]},
        "output": "random",
    }
    return parse_recipe(json.dumps(content), name="t2r bench train")


def _line(result: dict[str, Any]) -> str:
    start = (
        f"{result['stage']:9} {result['train']:6} {result['length']:6} {result['micro_batch_size']:6}  "
        f"{'yes' if result['gradient_checkpointing'] else 'no':4}"
    )
    if "out_of_memory" in result:
        return f"{start}   does not fit: {result['out_of_memory']}"
    peak = "" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f}"
    return (
        f"{start} {result['tokens_per_second']:10,.0f} {100 * result['mfu']:5.1f}% {peak:>10} "
        f"{result['flops_per_token']['total'] / 1e6:12,.0f}"
    )
