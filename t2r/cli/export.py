"""`t2r export`: write a student in another form."""

import click

from t2r.cli import command_line


@click.command("export", epilog="Example: t2r export runs/lora/stages/2-distill/adapter merged --format hf")
@click.argument("model", metavar="MODEL")
@click.argument("destination", metavar="DST")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "fla"]),
    default="hf",
    show_default=True,
    help="hf: a LoRA adapter merged into its student; fla: a student as flash-linear-attention has it (mixer gsa of "
    "style paper, gla or abc).",
)
@click.option("--base", metavar="DIR", help="The student of an adapter, when it was moved since.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that t2r wrote before.")
def command(model: str, destination: str, kind: str, base: str | None, overwrite: bool) -> None:
    """Write MODEL, the folder of a LoRA adapter (hf) or of a student (fla), as folder DST."""
    from pathlib import Path

    import t2r.model  # noqa: F401  (registers the student classes)
    from t2r.convert.adapter import merge_adapter
    from t2r.convert.export import export_to_fla

    call = command_line()
    if kind == "fla" and base is not None:
        raise click.UsageError("--base is for --format hf")
    if kind == "fla":
        export_to_fla(model, Path(destination), overwrite=overwrite, command=call)
    else:
        merge_adapter(Path(model), Path(destination), base=base, overwrite=overwrite, command=call)
    click.echo(f"{destination}: written and verified", err=True)
