"""`t2r convert`: turn a pretrained Transformer into a recurrent student."""

from typing import Any

import click

from t2r.cli import command_line


@click.command("convert", epilog="Example: t2r convert mistralai/Mistral-7B-v0.1 mistral-7b-gsa --slots 64")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", required=False)
@click.option("--mixer", help="What replaces attention.  [default: gsa]")
@click.option("--style", help="Style of the mixer, where it has styles (gsa: transfer or paper).")
@click.option("--slots", type=int, help="Memory slots per key/value head, where the mixer has slots; see --place.")
@click.option(
    "--place",
    metavar="TEXT|none",
    help="Share the slots out among the heads by what each needs on this text (gsa, style transfer): --slots is then "
    "their mean. Loads the teacher.  [default: text that ships with t2r, on a GPU or for a small teacher]",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other option of the mixer; repeatable."
)
@click.option("--layers", help='Which layers: "all", "0,2,5-9", "all except 3,6".  [default: all]')
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16", "source"]),
    default="bfloat16",
    show_default=True,
    help="Of the student's weights; source keeps each tensor's own.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the new parameters' initial values.")
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or Inf.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that t2r wrote before.")
@click.option(
    "--calibrate",
    metavar="TEXT",
    help="Measure the untrained student on this text: every layer's output error, KL and loss. Loads the teacher.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, every tensor by name.")
def command(
    source: str,
    destination: str | None,
    mixer: str | None,
    style: str | None,
    slots: int | None,
    place: str | None,
    settings: tuple[str, ...],
    layers: str | None,
    dtype: str,
    max_shard_size: str,
    seed: int,
    allow_nonfinite: bool,
    overwrite: bool,
    calibrate: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert SRC, a folder or Hub id of a Mistral, Llama, Qwen2 or Qwen3 checkpoint, and publish it as folder DST.
    A GSA, GLA or ABC checkpoint of flash-linear-attention is read as the mixer it holds.

    The plan is made from config.json, the index and the file headers, and from a measurement where slots are placed
    (--place); then tensors are streamed, verified and published all at once. DST may be left out with --dry-run.
    """
    if destination is None and not dry_run:
        raise click.UsageError("DST is missing (only --dry-run does without)")
    import json
    from pathlib import Path

    from t2r.cli.place import placed_mixers
    from t2r.convert.plan import make_plan
    from t2r.convert.run import check_destination, check_space, execute
    from t2r.convert.show import make_console, print_init_report, print_plan
    from t2r.model.mixers import parse_options
    from t2r.resources import resolve

    source = resolve(source)
    if destination is not None:
        check_destination(source, Path(destination), overwrite=overwrite)
    chosen = {"name": mixer, "layers": layers, "style": style, "slots": slots}
    options = {key: value for key, value in chosen.items() if value is not None} | _settings(settings)
    mixers = parse_options({"name": "gsa"} | options) if options else None
    written = None if dtype == "source" else dtype
    plan = make_plan(source, mixers, dtype=written, max_shard_size=max_shard_size, seed=seed, dry_run=dry_run)
    if destination is not None:
        check_space(Path(destination), plan.nbytes, plan.checkpoint.copied_files())
    if (found := placed_mixers(plan, place, dry_run=dry_run)) is not None:
        plan = make_plan(source, found, dtype=written, max_shard_size=max_shard_size, seed=seed)
    report = None if calibrate is None else _init_report(source, list(plan.config.mixers), calibrate, written, seed)
    if as_json:
        click.echo(json.dumps(plan.to_json() | ({} if report is None else {"calibration": report}), indent=1))
    else:
        print_plan(plan, make_console())
        if report is not None:
            print_init_report(report, make_console())
    if dry_run or destination is None:
        return
    execute(
        plan,
        Path(destination),
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        command=command_line(),
        calibration=report,
    )
    click.echo(f"{destination}: converted and verified", err=True)


def _init_report(source: str, entries: list[Any], text: str, dtype: str | None, seed: int) -> dict[str, Any]:
    from t2r.convert.calibrate import calibrate
    from t2r.recipe.schema import DataSource
    from t2r.train.documents import open_source, stream_documents

    documents = stream_documents(open_source(DataSource(source=[text])))
    return calibrate(source, entries, documents, dtype=dtype, seed=seed)


def _settings(settings: tuple[str, ...]) -> dict[str, object]:
    """KEY=VALUE pairs; a value is read as JSON where it is JSON (64, 0.5, true, null), else as text."""
    import json

    found: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--set {setting!r}: expected KEY=VALUE")
        if key in found:
            raise click.UsageError(f"--set {key}: given twice")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
