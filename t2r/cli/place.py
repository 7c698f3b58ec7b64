"""Slots shared out among the key/value heads before anything is converted: as the section `place` of a recipe asks, and
by default in `t2r convert`."""

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from t2r.convert.plan import Plan
    from t2r.model import MixerOptions
    from t2r.recipe import Recipe
    from t2r.recipe.schema import DataSource

TEXT = "shipped:demo/data/train.parquet"
WINDOWS, WINDOW = 8, 2048  # fewer windows are too few documents of TEXT: four placed worse, eight as more text does
CPU_PARAMETERS = 30_000_000  # two minutes on one core
GPU_BYTES = 2 << 30  # beside the weights: inputs of all layers, one layer's activations, logits of some tokens


def placed(recipe: "Recipe") -> "Recipe":
    """The recipe with its slots where the measurement that it asks for wants them, and without that section; the recipe
    itself where it asks for none. What was measured is kept in the run's folder: an interrupted run goes on with it.

    Raises:
        InputError: a mixer whose heads cannot differ, too little text, or a folder with another recipe's placement.
    """
    if not recipe.place.windows:
        return recipe
    from t2r.convert.select import grouped
    from t2r.errors import InputError
    from t2r.model import parse_options
    from t2r.publish import write_whole
    from t2r.recipe import RunFolder
    from t2r.recipe.schema import Place
    from t2r.resources import resolve

    folder, settings = RunFolder(recipe), recipe.model_dump(mode="json")
    asked = {key: settings[key] for key in ("model", "mixer", "place")} | {"text": settings["data"]["source"]}
    if folder.placement.is_file():
        kept = json.loads(folder.placement.read_text())
        if kept["asked"] != asked:
            raise InputError(f"{folder.placement}: of another recipe; name another output, or remove the folder")
    else:
        folder.check()
        (options,) = recipe.mixer
        entries = _measure(
            resolve(recipe.model.source),
            options,
            recipe.data,
            windows=recipe.place.windows,
            window=recipe.place.window,
            seed=recipe.seed,
        )
        kept = {"asked": asked, "mixer": grouped(entries)}
        write_whole(folder.placement, json.dumps(kept, indent=1) + "\n")
    mixers = [parse_options(mixer) for mixer in kept["mixer"]]
    return recipe.model_copy(update={"mixer": mixers, "place": Place()})


def placed_mixers(plan: "Plan", text: str | None, *, dry_run: bool = False) -> "list[MixerOptions] | None":
    """The mixers of a conversion with their slots shared out by head; None where they stay as they are planned.

    Args:
        plan: with the same mixer wherever the attention is replaced.
        text: what to measure on; "none": nothing is placed. None: on the text that ships with t2r where the mixer's
            heads can differ and a GPU, or a teacher small enough for a CPU, makes it a matter of seconds; one line
            tells where that is not so.
        dry_run: run no model, tell what would be done.

    Raises:
        InputError: where `text` is given: as `check_slots`, no tokenizer, or too little text.
    """
    from t2r.convert.select import grouped
    from t2r.convert.select_slots import can_place
    from t2r.errors import InputError
    from t2r.model import parse_options
    from t2r.recipe.schema import DataSource

    entries = plan.config.mixers
    layers = [layer for layer, entry in enumerate(entries) if entry is not None]
    if text == "none" or not layers:
        return None
    options: Any = parse_options({**entries[layers[0]], "layers": ",".join(map(str, layers))})
    if text is None:
        if not (can_place(options) and isinstance(options.slots, int)):
            return None
        if reason := _too_dear(plan, options):
            _tell_unplaced(reason)
            return None
    if dry_run:
        _say(f"slots: the conversion itself places them by head, measured on {text or TEXT} (--place)")
        return None
    data, window = DataSource(source=[text or TEXT]), min(WINDOW, plan.config.max_position_embeddings)
    source = str(plan.checkpoint.folder)
    try:
        found = _measure(source, options, data, windows=WINDOWS, window=window, seed=plan.seed)
    except InputError as error:
        if text is not None:
            raise
        _tell_unplaced(str(error))
        return None
    return [parse_options(mixer) for mixer in grouped(found)]


def _too_dear(plan: "Plan", options: Any) -> str | None:
    """Why slots are not placed unasked, if they are not."""
    import torch

    from t2r.convert.select_slots import SMALLEST

    if options.slots < SMALLEST:
        return f"fewer than {SMALLEST} on average"
    parameters = sum(tensor.elements for tensor in plan.tensors if tensor.source is not None)
    if not torch.cuda.is_available():
        return f"no GPU, for {parameters:,} parameters" if parameters > CPU_PARAMETERS else None
    free, needed = torch.cuda.mem_get_info()[0], 2 * parameters + GPU_BYTES
    return f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on the GPU" if needed > free else None


def _measure(
    source: str, options: Any, data: "DataSource", *, windows: int, window: int, seed: int
) -> list[dict[str, Any] | None]:
    """The mixer of each layer of the teacher in folder or Hub id `source`, which runs in bfloat16 on a GPU and in
    float32 on a CPU."""
    import torch
    from tqdm import tqdm

    from t2r.convert.calibrate import calibration_windows
    from t2r.convert.select_slots import check_slots, in_words, place_slots
    from t2r.errors import InputError
    from t2r.model import load, load_tokenizer, pick_device
    from t2r.train.documents import open_source, stream_documents
    from t2r_evals.speed import empty

    slots = getattr(options, "slots", 0)
    if isinstance(slots, tuple):
        raise InputError(f"place: the slots {list(slots)} are one for each head already")
    check_slots(options, slots)
    documents = stream_documents(open_source(data))
    ids = calibration_windows(documents, load_tokenizer(source), windows=windows, window=window)
    device = torch.device(pick_device("auto"))
    teacher, _ = load(source, dtype="bfloat16" if device.type == "cuda" else "float32", device=str(device))
    with tqdm(total=windows, desc="slots by head", unit="window", disable=None) as bar:
        entries = place_slots(teacher, ids, options, slots=slots, seed=seed, advance=bar.update)
    del teacher
    empty(device)
    _say(in_words(entries))
    return entries


def _tell_unplaced(reason: str) -> None:
    _say(f"slots: the same in every head, not placed ({reason}); --place TEXT measures where they belong")


def _say(text: str) -> None:
    click.echo(text, err=True)
