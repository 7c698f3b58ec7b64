"""t2r report: render or compare stored results; runs no model."""

from pathlib import Path

import click

from t2r.cli import options


@click.command(short_help="Render or compare stored results; runs no model.")
@click.argument("results", nargs=-1, required=True, metavar="RESULT_DIR...", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the new report.")
@click.option("--title", help="Title of the new report.")
def command(results: tuple[Path, ...], output: Path, title: str | None) -> None:
    """Read report.json from each RESULT_DIR and write report.json, report.md and report.html to --output.

    One folder is rendered again; several are put side by side, each model once.
    """
    from t2r_evals import load_report, write_report
    from t2r_evals.merge import merge_reports

    reports = [load_report(path) for path in results]
    labels = [_label(path) for path in results]
    merged = (
        reports[0] if len(reports) == 1 else merge_reports(dict(zip(_distinct(labels, results), reports, strict=True)))
    )
    if title is not None:
        merged = merged.model_copy(update={"title": title})
    options.make_folder(output)
    write_report(merged, output)
    click.echo(output / "report.html")


def _label(path: Path) -> str:
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    return folder.parent.name if folder.name == "evaluation" else folder.name


def _distinct(labels: list[str], paths: tuple[Path, ...]) -> list[str]:
    return [label if labels.count(label) == 1 else str(path) for label, path in zip(labels, paths, strict=True)]
