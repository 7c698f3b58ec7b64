"""`t2r recipes`: list, show, copy and validate recipes."""

from pathlib import Path

import click


@click.group("recipes")
def command() -> None:
    """List, show, copy and validate recipes."""


@command.command()
def ls() -> None:
    """The recipes that ship with t2r, each with what it is for."""
    for path in _shipped():
        click.echo(f"{path.stem:28} {_purpose(path)}")


@command.command()
@click.argument("name")
def cat(name: str) -> None:
    """Print the recipe NAME."""
    click.echo(_find(name).read_text(), nl=False)


@command.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
def cp(name: str, destination: Path) -> None:
    """Copy the recipe NAME to DESTINATION, a new file or a folder."""
    from t2r.errors import InputError

    source = _find(name)
    target = destination / source.name if destination.is_dir() else destination
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder")
    try:
        with open(target, "x") as file:
            file.write(source.read_text())
    except FileExistsError:
        raise InputError(f"{target}: already exists") from None
    click.echo(target)


@command.command(epilog="Example: t2r recipes validate my.yaml stages.0.lr=1e-4")
@click.argument("name", required=False, metavar="[RECIPE]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes instead.")
def validate(name: str | None, overrides: tuple[str, ...], schema: bool) -> None:
    """Check RECIPE, a file or the name of a shipped one, and tell everything that is wrong with it."""
    import json

    if schema:
        from t2r.recipe import Recipe

        click.echo(json.dumps(Recipe.model_json_schema(), indent=2))
    if name is None:
        if not schema:
            raise click.UsageError("name a recipe, or pass --schema")
        return
    from t2r.recipe import find_recipe, load_recipe

    load_recipe(name, list(overrides))
    click.echo(f"{find_recipe(name)}: valid", err=schema)


def _shipped() -> list[Path]:
    from t2r.resources import recipes_root

    return sorted(recipes_root().glob("*.yaml"))


def _find(name: str) -> Path:
    import difflib

    from t2r.errors import InputError

    shipped = {path.stem: path for path in _shipped()}
    stem = name.removesuffix(".yaml")
    if stem not in shipped:
        close = difflib.get_close_matches(stem, shipped, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(shipped)}"
        raise InputError(f"{name}: no recipe of that name ships with t2r; {hint}")
    return shipped[stem]


def _purpose(path: Path) -> str:
    """The first comment line that is not the command."""
    for line in path.read_text().splitlines():
        text = line.removeprefix("#").strip()
        if text and line.startswith("#") and not text.startswith(("t2r ", "torchrun ")):
            return text
    return ""
