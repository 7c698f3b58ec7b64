"""`t2r export`: write a student in another form."""

import sys

import click


@click.command("export", epilog="Example: t2r export runs/lora/stages/2-distill/adapter merged --format hf")
@click.argument("model", metavar="MODEL")
@click.argument("destination", metavar="DST")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf"]),
    default="hf",
    show_default=True,
    help="hf: the student with its LoRA adapter merged, an ordinary transformers folder.",
)
@click.option("--base", metavar="DIR", help="The student of an adapter, when it was moved since.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that t2r wrote before.")
def command(model: str, destination: str, kind: str, base: str | None, overwrite: bool) -> None:
    """Write MODEL, the folder of a LoRA adapter, as folder DST."""
    from pathlib import Path

    import t2r.model  # noqa: F401  (registers the student classes)
    from t2r.convert.adapter import merge_adapter

    merge_adapter(Path(model), Path(destination), base=base, overwrite=overwrite, command=["t2r", *sys.argv[1:]])
    click.echo(f"{destination}: merged and verified", err=True)
