"""t2r eval: measure a model, beside its teacher."""

from pathlib import Path
from typing import Any

import click

from t2r.cli import command_line, options

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(
    short_help="Measure a model, beside its teacher.",
    epilog="Example: t2r eval runs/demo/model --baseline shipped:demo/teacher "
    "--text shipped:demo/data/validation.parquet --output runs/eval",
)
@click.argument("model", required=False)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the report.")
@click.option("--baseline", metavar="TEACHER", help="Model to compare with, on the same items; folder or Hub id.")
@click.option(
    "--control", "controls", multiple=True, metavar="MODEL", help="Further model to compare; may be repeated."
)
@click.option(
    "--suite", "suites", type=options.Names(), default="", help="language, commonsense, knowledge, recall, synthetic."
)
@click.option("--tasks", type=options.Names(), default="", help="lm-eval tasks by name.")
@click.option("--text", metavar="TEXT", help="File or folder of text for --suite language; see above.")
@click.option("--windows", type=click.IntRange(min=1), default=48, show_default=True, help="Windows of text to score.")
@click.option("--window", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per window.")
@click.option("--shots", type=click.IntRange(min=0), help="Examples in the prompt; default: each task's own.")
@click.option("--limit", type=click.IntRange(min=1), help="First N documents of each task.")
@click.option("--max-length", type=click.IntRange(min=2), default=2048, show_default=True, help="Context for tasks.")
@click.option("--offline-root", type=_FOLDER, help="Folder that stands in for the Hub's data sets.")
@click.option("--make-offline-root", type=click.Path(path_type=Path), help="Fill such a folder, and measure nothing.")
@click.option("--tasks-root", type=_FOLDER, help="Further task definitions. They may run code.")
@click.option("--recall-lengths", type=options.Lengths(), default="512,1K,2K", show_default=True, help="For synthetic.")
@click.option("--recall-items", type=click.IntRange(min=1), default=10, show_default=True, help="Per length and depth.")
@click.option("--speed", "contexts", type=options.Lengths(), default="", help="Measure speed at these prompt lengths.")
@click.option("--largest-batch", type=click.IntRange(min=1), default=1, show_default=True, help="For --speed on a GPU.")
@click.option(
    "--kl/--no-kl", default=True, help="KL to the baseline; keeps it in memory beside each model. [default: kl]"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@options.device
@options.dtype
@click.option("--seed", type=int, default=0, show_default=True)
def command(
    model: str | None,
    output: Path | None,
    make_offline_root: Path | None,
    baseline: str | None,
    controls: tuple[str, ...],
    suites: tuple[str, ...],
    text: str | None,
    dtype: str,
    device: str,
    kl: bool,
    **settings: Any,
) -> None:
    """Measure MODEL (a folder or a Hub id) and write report.json, report.md and report.html to --output.

    TEXT may be text, JSONL or parquet (field "text"); in a text file, a line with one NUL character stands between
    documents. With no suite and no task, --text alone means --suite language. A stopped evaluation goes on when it is
    started again with the same --output: models that were measured are kept, and of the next one its finished tasks.

    Without network: on a machine that has it, `t2r eval --suite A,B --make-offline-root DIR` writes the data sets of
    those suites and tasks; take DIR along and pass it as --offline-root.
    """
    import os
    import sys

    # tqdm reads this when it is imported; a log file wants a line now and then, not ten a second.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")

    from t2r.errors import InputError

    if make_offline_root is not None:
        _make_tree(make_offline_root, suites, settings)
        return
    if model is None or output is None:
        raise InputError("t2r eval needs a MODEL and --output DIR")
    if text is not None and "language" not in suites:
        suites = ("language", *suites)
    if not (suites or settings["tasks"] or settings["contexts"]):
        raise InputError("nothing to measure: pass --text FILE, --suite, --tasks or --speed")
    if "language" in suites and text is None:
        raise InputError("--suite language: pass the text to read with --text FILE")
    documents = None if text is None else _documents(text)

    import datetime
    import shlex
    import time

    from t2r.cli.measure import Measuring
    from t2r.model import load_tokenizer, locate
    from t2r.resources import resolve
    from t2r_evals import EvaluationOptions, Report, check_text, write_report
    from t2r_evals.harness import check_tasks
    from t2r_evals.provenance import machine, versions

    start = time.perf_counter()
    asked = EvaluationOptions(suites=suites, **settings)
    check_tasks(asked.suites, asked.tasks, asked.tasks_root)
    subjects: list[tuple[str, Any]] = [(baseline, "teacher")] if baseline else []
    subjects += [(model, "student"), *((control, "control") for control in controls)]
    # All of them before any is measured: a name may be mistyped.
    folders = [locate(resolve(source)) for source, _ in subjects]
    check_text(load_tokenizer(folders[0]), documents, asked)
    options.make_folder(output)
    names = _labels([source for source, _ in subjects])
    teacher = folders[0] if baseline and kl else None
    measuring = Measuring(output / "evaluation", asked, documents, dtype, device, teacher)
    results: list[Any] = []
    note = "Interrupted before every model was measured; the same command goes on from here."

    def write(notes: list[str]) -> None:
        report = Report(
            title=f"Evaluation of {names[1] if baseline else names[0]}",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=shlex.join(command_line()),
            source=baseline,
            target=model,
            machine=machine(),
            versions=versions(),
            settings={k: str(v) for k, v in asked.model_dump(exclude_none=True).items()} | {"device": device},
            results=results,
            notes=notes,
            seconds=time.perf_counter() - start,
        )
        write_report(report, output)

    try:
        for (_, role), name, folder in zip(subjects, names, folders, strict=True):
            results.append(measuring.result(name, role, folder))
    except KeyboardInterrupt:
        if results:
            write([note])
        raise
    write([])
    click.echo(output / "report.html")


def _make_tree(destination: Path, suites: tuple[str, ...], settings: dict[str, Any]) -> None:
    from t2r.errors import InputError
    from t2r_evals.suites import resolve_tasks
    from t2r_evals.tree import make_tree

    specs = resolve_tasks(suites, settings["tasks"], None)
    if not specs:
        raise InputError("--make-offline-root: name the tasks with --suite or --tasks")
    for folder in make_tree(
        specs, destination, offline_root=settings["offline_root"], tasks_root=settings["tasks_root"]
    ):
        click.echo(folder)


def _documents(text: str) -> list[str]:
    from t2r.errors import InputError
    from t2r.recipe.schema import DataSource
    from t2r.resources import resolve
    from t2r.train.documents import read_documents

    path = resolve(text)
    if not Path(path).exists():
        raise InputError(f"--text {text}: no such file or folder")
    return read_documents(DataSource(source=[path]))


def _labels(sources: list[str]) -> list[str]:
    """The last part of each path or Hub id, or the whole where two share it."""
    short = [source.removeprefix("shipped:").rstrip("/").rsplit("/", 1)[-1] for source in sources]
    return [
        name if short.count(name) == 1 else source.strip("/.").replace("/", "-")
        for name, source in zip(short, sources, strict=True)
    ]
