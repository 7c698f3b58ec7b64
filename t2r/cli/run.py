"""`t2r run`: convert, finetune, evaluate and report, each step skipped when its verified output is there."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from t2r.cli import command_line
from t2r.cli.controls import teacher_finetuned, window_only
from t2r.cli.place import placed

if TYPE_CHECKING:
    from t2r.model.mixers import MixerOptions
    from t2r.recipe import Recipe, RunFolder
    from t2r_evals import EvaluationOptions, ModelResult, Report, Sample
    from t2r_evals.schema import Role


@click.command("run", epilog="Example: t2r run demo output=runs/my-demo stages.1.tokens=200k")
@click.argument("recipe_name", metavar="RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume", default="auto", show_default=True, metavar="auto|never|PATH", help="Which checkpoint to continue from."
)
def command(recipe_name: str, overrides: tuple[str, ...], resume: str) -> None:
    """Carry out RECIPE, a file or the name of a shipped recipe, from conversion to report.

    Run it again after an interruption: what is finished and verified is kept.

    With the control teacher-finetuned, OUTPUT/controls/teacher-finetuned/recipe.yaml is that training's own recipe;
    torchrun -m t2r finetune carries it out on several GPUs beforehand.
    """
    from t2r.cli.summary import summary
    from t2r.recipe import RunFolder, load_recipe
    from t2r.train import is_finished
    from t2r_evals.harness import check_data, check_tasks

    started = time.monotonic()
    recipe = load_recipe(recipe_name, list(overrides))
    # Before hours of training, not after.
    check_tasks(recipe.evaluate.suites, recipe.evaluate.tasks, None)
    recipe = placed(recipe)
    controls = recipe.evaluate.controls
    windows = [window_only(mixer) for mixer in recipe.mixer] if "window-only" in controls else []
    folder = RunFolder(recipe)
    finetuned = teacher_finetuned(recipe, folder) if "teacher-finetuned" in controls else None
    finished = is_finished(recipe)  # hashes every stage's model: once
    if not finished:
        offline_root = recipe.evaluate.offline_root
        check_data(recipe.evaluate.suites, recipe.evaluate.tasks, Path(offline_root) if offline_root else None)
        _check_text(recipe)
    prepare(recipe, folder, calibrate=recipe.calibrate.windows > 0)
    train_student(recipe, folder, resume, finished=finished)
    if windows:
        _convert(recipe, windows, folder.controls / "window-only")
    if finetuned is not None:
        _finetune_teacher(finetuned, "never" if resume == "never" else "auto")
    report = measure_and_report(recipe, folder, started)
    click.echo(summary(report, folder, time.monotonic() - started))


def _check_text(recipe: "Recipe") -> None:
    from t2r.model import load_tokenizer
    from t2r.resources import resolve
    from t2r_evals import check_text

    check_text(load_tokenizer(resolve(recipe.model.source)), _validation_documents(recipe), _options(recipe))


def prepare(recipe: "Recipe", folder: "RunFolder", *, calibrate: bool = False) -> None:
    """Make `folder` the recipe's, and the student before any training in its `converted/`. Nothing is written where
    the teacher, the mixers or the texts are not right."""
    from t2r.convert.plan import make_plan
    from t2r.convert.run import check_destination
    from t2r.resources import resolve
    from t2r.train.documents import check_sources

    if not folder.model.exists():
        check_sources(recipe.data)
    if not folder.converted.exists():
        source = resolve(recipe.model.source)
        check_destination(source, folder.converted, overwrite=True)
        make_plan(source, recipe.mixer, dtype=recipe.model.dtype)
    folder.claim()
    _convert(recipe, recipe.mixer, folder.converted, calibrate=calibrate)


def _convert(recipe: "Recipe", mixers: "Sequence[MixerOptions]", destination: Path, *, calibrate: bool = False) -> None:
    from t2r.convert import convert
    from t2r.resources import resolve

    if _published(destination):
        _say(f"{destination}: there and verified, kept")
        return
    source = resolve(recipe.model.source)
    report = _init_report(recipe, source) if calibrate else None
    convert(
        source,
        destination,
        mixers=mixers,
        dtype=recipe.model.dtype,
        seed=recipe.seed,
        command=command_line(),
        overwrite=True,
        calibration=report,
    )
    _say(f"{destination}: converted from {recipe.model.source}")


def _init_report(recipe: "Recipe", source: str) -> dict[str, Any]:
    """What the student is before training, on the first windows of the training text; printed too."""
    from t2r.convert.calibrate import calibrate
    from t2r.convert.plan import make_plan
    from t2r.convert.show import make_console, print_init_report
    from t2r.train.documents import open_source, stream_documents

    report = calibrate(
        source,
        list(make_plan(source, recipe.mixer, dtype=recipe.model.dtype).config.mixers),
        stream_documents(open_source(recipe.data)),
        windows=recipe.calibrate.windows,
        window=recipe.calibrate.window,
        dtype=recipe.model.dtype,
        seed=recipe.seed,
    )
    print_init_report(report, make_console())
    return report


def train_student(recipe: "Recipe", folder: "RunFolder", resume: str, *, finished: bool) -> None:
    """All stages; the final student in `model/`."""
    from t2r.train import finetune

    if resume == "auto" and finished:
        _say(f"{folder.model}: there and verified, kept")
    else:
        finetune(recipe, resume=resume)


def _finetune_teacher(recipe: "Recipe", resume: str) -> None:
    """The control "teacher-finetuned", a run of its own below `controls/`."""
    from t2r.recipe import RunFolder
    from t2r.train import is_finished

    folder = RunFolder(recipe)
    prepare(recipe, folder)
    train_student(recipe, folder, resume, finished=is_finished(recipe))


def measure_and_report(recipe: "Recipe", folder: "RunFolder", started: float) -> "Report":
    """Teacher, student and controls measured the same way; samples; report.json, report.md and report.html."""
    from t2r.cli.card import add_measurements
    from t2r.cli.summary import describe_conversion
    from t2r_evals import Report, write_report
    from t2r_evals.provenance import machine, versions
    from t2r_evals.stages import read_stage

    results, samples = measure(recipe, folder)
    report = Report(
        title=f"{recipe.model.source.removeprefix('shipped:')} as a recurrent model",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=shlex.join(command_line()),
        source=recipe.model.source,
        target=str(folder.model),
        machine=machine(),
        versions=versions(),
        conversion=describe_conversion(recipe, folder),
        stages=[read_stage(stage.path) for stage in folder.stages],
        results=results,
        samples=samples,
        settings=recipe.model_dump(mode="json"),
        seconds=round(time.monotonic() - started, 1),
    )
    report = write_report(report, folder.path)
    add_measurements(report, folder.model)
    return report


def measure(recipe: "Recipe", folder: "RunFolder") -> "tuple[list[ModelResult], list[Sample]]":
    """One result per model, and the student's continuations of the recipe's prompts."""
    from t2r.cli.measure import Measuring
    from t2r.model import locate
    from t2r.resources import resolve

    models: list[tuple[str, Role, Path]] = [("student", "student", folder.model)]
    if "no-training" in recipe.evaluate.controls:
        models.append(("no training", "control", folder.converted))
    if "window-only" in recipe.evaluate.controls:
        models.append(("window only", "control", folder.controls / "window-only"))
    if "teacher-finetuned" in recipe.evaluate.controls:
        models.append(("teacher finetuned", "control", folder.controls / "teacher-finetuned" / "model"))
    teacher = locate(resolve(recipe.model.source)) if recipe.evaluate.baseline else None
    if teacher is not None:
        models.insert(0, ("teacher", "teacher", teacher))
    measuring = Measuring(
        folder.evaluation, _options(recipe), _validation_documents(recipe), recipe.model.dtype, teacher=teacher
    )
    results, samples = [], []
    for name, role, path in models:
        results.append(measuring.result(name, role, path))
        if role == "student" and recipe.generate.prompts:
            samples = _samples(recipe, *measuring.load(path))
    return results, samples


def _options(recipe: "Recipe") -> "EvaluationOptions":
    from t2r_evals import EvaluationOptions

    asked = recipe.evaluate
    return EvaluationOptions(
        suites=tuple(asked.suites),
        tasks=tuple(asked.tasks),
        limit=asked.limit,
        windows=asked.windows,
        window=asked.window,
        batch_size=asked.batch_size,
        max_length=asked.max_length,
        offline_root=Path(asked.offline_root) if asked.offline_root else None,
        recall_lengths=tuple(asked.recall_lengths),
        recall_items=asked.recall_items,
        contexts=tuple(asked.speed_contexts),
        largest_batch=asked.largest_batch,
        seed=recipe.seed,
    )


def _samples(recipe: "Recipe", model: Any, tokenizer: Any) -> "list[Sample]":
    from t2r.generate import generate
    from t2r_evals import Sample

    return [
        Sample(
            prompt=prompt,
            text="".join(generate(model, tokenizer, prompt, max_new_tokens=recipe.generate.max_new_tokens)),
            model="student",
        )
        for prompt in recipe.generate.prompts
    ]


def _validation_documents(recipe: "Recipe") -> list[str] | None:
    from t2r.train.documents import read_documents

    return read_documents(recipe.data.validation) if recipe.data.validation else None


def _published(folder: Path) -> bool:
    """There, and every file is what its manifest says. What does not verify is made anew, and that is said."""
    from t2r.publish import verify_manifest

    if not folder.exists():
        return False
    problems = verify_manifest(folder)
    if problems:
        _say(f"{problems[0]}; making {folder} anew")
    return not problems


def _say(text: str) -> None:
    click.echo(text, err=True)
