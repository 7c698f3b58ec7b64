"""The controls of a run: what a student must beat for its training, its mixer or its data to have earned something."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2r.model.mixers import MixerOptions
    from t2r.recipe import Recipe, RunFolder


def window_only(mixer: "MixerOptions") -> "MixerOptions":
    """Softmax over the tokens that a mixer of these options could hold in its slots, one each."""
    from t2r.model.mixers import parse_options

    sinks, slots = getattr(mixer, "sinks", 4), getattr(mixer, "slots", 64)
    window = [each - sinks for each in slots] if isinstance(slots, tuple) else slots - sinks
    return parse_options({"name": "softmax", "sinks": sinks, "window": window, "layers": mixer.layers})


def teacher_finetuned(recipe: "Recipe", folder: "RunFolder") -> "Recipe":
    """The teacher, its attention untouched, finetuned by cross-entropy on the data and the token budget of `recipe`:
    what the text alone would have given, and what the student's distance to the teacher hides.

    One stage, as the last of `recipe` that trains more than mixers (batch, schedule, precision, adapter); its learning
    rate is that stage's for the parameters outside the mixers.
    """
    from t2r.model.mixers import parse_options
    from t2r.recipe import AlignStage, FinetuneStage

    last = next((stage for stage in reversed(recipe.stages) if not isinstance(stage, AlignStage)), None)
    tokens = sum(stage.steps * stage.batch_tokens for stage in recipe.stages)
    values = {} if last is None else last.model_dump(include=set(FinetuneStage.model_fields) - {"kind", "train", "lr"})
    if last is None:
        shared = ("sequence_length", "batch_tokens", "micro_batch_size", "precision")
        values = recipe.stages[-1].model_dump(include=set(shared))
    elif last.lr.rest:
        values["lr"] = {"mixer": last.lr.rest, "rest": last.lr.rest}
    stage = FinetuneStage(kind="finetune", **{**values, "tokens": max(tokens, values["batch_tokens"])})
    return recipe.model_copy(
        update={
            "mixer": [parse_options({"name": "softmax"})],
            "stages": [stage],
            "evaluate": type(recipe.evaluate)(),
            "generate": type(recipe.generate)(),
            "output": str(folder.controls / "teacher-finetuned"),
        }
    )
