"""Slots shared out among the key/value heads, as the section `place` of a recipe asks, before anything is converted."""

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from t2r.recipe import Recipe


def placed(recipe: "Recipe") -> "Recipe":
    """The recipe with its slots where the measurement that it asks for wants them, and without that section; the recipe
    itself where it asks for none. What was measured is kept in the run's folder: an interrupted run goes on with it.

    Raises:
        InputError: a mixer whose heads cannot differ, too little text, or a folder with another recipe's placement.
    """
    if not recipe.place.windows:
        return recipe
    from t2r.errors import InputError
    from t2r.model import parse_options
    from t2r.publish import write_whole
    from t2r.recipe import RunFolder
    from t2r.recipe.schema import Place

    folder, settings = RunFolder(recipe), recipe.model_dump(mode="json")
    asked = {key: settings[key] for key in ("model", "mixer", "place")} | {"text": settings["data"]["source"]}
    if folder.placement.is_file():
        kept = json.loads(folder.placement.read_text())
        if kept["asked"] != asked:
            raise InputError(f"{folder.placement}: of another recipe; name another output, or remove the folder")
    else:
        folder.check()
        kept = {"asked": asked, "mixer": _measure(recipe)}
        folder.path.mkdir(parents=True, exist_ok=True)
        write_whole(folder.placement, json.dumps(kept, indent=1) + "\n")
    mixers = [parse_options(mixer) for mixer in kept["mixer"]]
    return recipe.model_copy(update={"mixer": mixers, "place": Place()})


def _measure(recipe: "Recipe") -> list[dict[str, Any]]:
    """The mixers, each with the layers that it is for."""
    from t2r.convert.calibrate import Probe, calibration_windows
    from t2r.convert.select import grouped
    from t2r.convert.select_slots import check_slots, in_words, place_slots
    from t2r.errors import InputError
    from t2r.model import load
    from t2r.resources import resolve
    from t2r.train.documents import open_source, stream_documents

    (options,) = recipe.mixer
    slots: Any = getattr(options, "slots", 0)
    if isinstance(slots, tuple):
        raise InputError(f"place.windows: the slots {list(slots)} are one for each head already; set it to 0")
    check_slots(options, slots, by_head=True)
    documents = stream_documents(open_source(recipe.data))
    teacher, tokenizer = load(resolve(recipe.model.source), dtype=recipe.model.dtype)
    ids = calibration_windows(documents, tokenizer, windows=recipe.place.windows, window=recipe.place.window)
    entries = place_slots(Probe(teacher, ids), options, slots=slots, tell=_say)
    _say(in_words(entries))
    return grouped(entries)


def _say(text: str) -> None:
    click.echo(text, err=True)
