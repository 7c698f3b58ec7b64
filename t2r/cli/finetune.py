"""`t2r finetune`: train a converted student by the stages of a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from t2r.recipe import Recipe


@click.command("finetune", epilog="Example: t2r finetune demo output=runs/my-demo stages.0.lr=2e-3 --dry-run")
@click.argument("recipe_name", metavar="RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume", default="auto", show_default=True, metavar="auto|never|PATH", help="Which checkpoint to continue from."
)
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and its stages, and stop.")
def command(recipe_name: str, overrides: tuple[str, ...], resume: str, dry_run: bool) -> None:
    """Carry out the stages of RECIPE, a file or the name of a shipped recipe; convert first where that was not done.

    On several GPUs: torchrun --nproc-per-node 8 -m t2r finetune RECIPE
    """
    from t2r.recipe import RunFolder, dump, load_recipe

    recipe = load_recipe(recipe_name, list(overrides))
    if dry_run:
        click.echo(dump(recipe), nl=False)
        click.echo(_outline(recipe))
        return
    from t2r.cli.place import placed
    from t2r.cli.run import prepare
    from t2r.train import finetune, processes

    state = processes()
    if state.is_main_process:
        recipe = placed(recipe)
        prepare(recipe, RunFolder(recipe))
    state.wait_for_everyone()
    recipe = placed(recipe)  # the others read what the main process has measured
    model = finetune(recipe, resume=resume if resume in ("auto", "never") else Path(resume))
    if state.is_main_process:
        click.echo(model)


def _outline(recipe: "Recipe") -> str:
    """The stages as a table of comments, so that the whole output is still a recipe."""
    lines = ["", "# stage          steps     tokens/step  sequence  tokens"]
    for number, stage in enumerate(recipe.stages, 1):
        name = f"{number}-{stage.kind}"
        tokens = stage.steps * stage.batch_tokens
        lines.append(f"# {name:14} {stage.steps:<9,} {stage.batch_tokens:<12,} {stage.sequence_length:<9,} {tokens:,}")
    total = sum(stage.steps * stage.batch_tokens for stage in recipe.stages)
    return "\n".join([*lines, f"# {'all':47} {total:,}"])
