"""Options that several verbs share."""

import click

dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="auto keeps the stored one.",
)
device = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto is the GPU when there is one."
)
