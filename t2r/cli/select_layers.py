"""`t2r select-layers`: which layers keep softmax, and how many slots the others get, by measurement."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from t2r.cli import command_line

if TYPE_CHECKING:
    from t2r.convert.calibrate import Probe
    from t2r.recipe import Recipe


@click.command("select-layers", epilog="Example: t2r select-layers gsa-mistral-7b --keep 4 --write hybrid.yaml")
@click.argument("recipe_name", metavar="RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--keep", type=click.IntRange(min=0), default=0, show_default=True, help="Layers that stay softmax.")
@click.option(
    "--method",
    type=click.Choice(["greedy", "kl"]),
    default="greedy",
    show_default=True,
    help="greedy: one after the other, each beside those before; kl: each judged on its own.",
)
@click.option("--slots", type=click.IntRange(min=1), help="Place this many slots per key/value head, on average.")
@click.option("--windows", type=click.IntRange(min=1), default=8, show_default=True, help="Windows of text.")
@click.option("--window", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per window.")
@click.option("--dtype", type=click.Choice(["recipe", "float32", "bfloat16"]), default="recipe", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto is the GPU when there is one.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the recipe with the layers chosen to this file.")
def command(
    recipe_name: str,
    overrides: tuple[str, ...],
    keep: int,
    method: str,
    slots: int | None,
    windows: int,
    window: int,
    dtype: str,
    device: str,
    write: Path | None,
) -> None:
    """Rank the layers of RECIPE's teacher by what their conversion costs, choose, and write the choice into a recipe.

    Mixers take the attention's place in memory, untrained, on the first windows of the recipe's training text; the cost
    is KL(teacher || student) in nats per token, of slots to second order. Any teacher: model.source=MODEL
    data.source=TEXT.
    """
    from t2r.convert.calibrate import Probe, calibration_windows
    from t2r.convert.select import check_keep, grouped, keep_layers, rank, without
    from t2r.convert.select_slots import check_slots, in_words, place_slots
    from t2r.errors import InputError
    from t2r.model import assign_mixers, load
    from t2r.recipe import load_recipe
    from t2r.resources import resolve
    from t2r.train.documents import open_source, stream_documents

    recipe = load_recipe(recipe_name, list(overrides))
    if write is not None and write.exists():
        raise InputError(f"--write {write}: exists; name another file")
    if slots is not None and len(recipe.mixer) > 1:
        raise InputError(f"--slots: the recipe has {len(recipe.mixer)} mixers; slots are placed for one")
    if slots is not None:
        check_slots(recipe.mixer[0], slots)
    documents = stream_documents(open_source(recipe.data))
    teacher, tokenizer = load(
        resolve(recipe.model.source), dtype=recipe.model.dtype if dtype == "recipe" else dtype, device=device
    )
    ids = calibration_windows(documents, tokenizer, windows=windows, window=window)
    probe = Probe(teacher, ids, seed=recipe.seed)
    entries = assign_mixers(recipe.mixer, probe.layers)
    if keep:
        check_keep(entries, keep)
    _show_ranking(probe, rank(probe, entries), entries)
    kept: list[int] = []
    if keep:
        kept = keep_layers(probe, entries, keep, method=method, tell=_say)
        click.echo(f"keep as softmax: {', '.join(map(str, kept))}")
    if slots is not None:
        (options,) = recipe.mixer
        rest = [layer for layer, entry in enumerate(entries) if entry is not None and layer not in kept]
        options = options.model_copy(update={"layers": ",".join(map(str, rest))})
        entries = place_slots(teacher, ids, options, slots=slots, seed=recipe.seed)
        click.echo(in_words(entries))
    entries = without(entries, kept)
    chosen = probe.score(entries)
    click.echo(f"chosen: KL {chosen.kl:.4f}, loss {chosen.loss:.4f} ({probe.measured} students measured)")
    if write is not None:
        place = recipe.place.model_dump() if slots is None else {}
        _write(recipe, {"mixer": grouped(entries), "place": place}, write)
        click.echo(f"{write}: written; next: t2r run {write}")


def _show_ranking(probe: "Probe", ranking: list[Any], entries: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    whole, teacher = probe.score(entries), probe.score([None] * probe.layers)
    table = Table("layer", "KL, it alone converted", "KL, it alone softmax", title="Layers, most worth keeping first")
    for score in ranking:
        table.add_row(str(score.layer), f"{score.alone:.4f}", f"{score.kept:.4f}")
    Console().print(table)
    click.echo(f"teacher: loss {teacher.loss:.4f}; every layer converted: loss {whole.loss:.4f}, KL {whole.kl:.4f}")


def _write(recipe: "Recipe", chosen: dict[str, Any], path: Path) -> None:
    """The recipe with the sections `chosen`, whole or not at all; it is read back as any recipe is."""
    import shlex

    import yaml

    from t2r.publish import write_whole
    from t2r.recipe import parse_recipe

    content = {**recipe.model_dump(mode="json"), **chosen}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    header = f"# t2r run {path}\n#\n# Layers chosen by: {shlex.join(command_line())}\n"
    parse_recipe(header + text, name=str(path))
    write_whole(path, header + text)


def _say(text: str) -> None:
    click.echo(text, err=True)
