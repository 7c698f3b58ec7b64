"""Several runs side by side in one report."""

from collections.abc import Mapping

from t2r_evals.errors import InputError
from t2r_evals.schema import Comparison, ModelResult, Report, Run


def merge_reports(reports: Mapping[str, Report]) -> Report:
    """One report of many, by label.

    A model that several runs measured with the same outcome (the common teacher) appears once, under its own name;
    any other model is called "LABEL: NAME". Comparisons made within a run are kept as they are.

    Raises:
        InputError: fewer than two reports.
    """
    if len(reports) < 2:
        raise InputError("report: a comparison needs two results or more")
    results: list[ModelResult] = []
    comparisons: list[Comparison] = []
    common: dict[str, ModelResult] = {}
    for label, report in reports.items():
        names = {}
        for result in report.results:
            key = _outcome(result)
            if result.role == "teacher" and key in common:
                names[result.name] = common[key].name
                continue
            taken = result.role != "teacher" or any(result.name == other.name for other in results)
            renamed = result.model_copy(update={"name": f"{label}: {result.name}" if taken else result.name})
            names[result.name] = renamed.name
            if result.role == "teacher":
                common[key] = renamed
            results.append(renamed)
        comparisons += [
            c.model_copy(update={"model": names[c.model], "baseline": names[c.baseline]})
            for c in report.comparisons or []
        ]
    first = next(iter(reports.values()))
    sources = {report.source for report in reports.values()}
    return Report(
        title=f"Comparison of {', '.join(reports)}",
        created=max(report.created for report in reports.values()),
        source=first.source if len(sources) == 1 else None,
        machine=first.machine if all(r.machine == first.machine for r in reports.values()) else {},
        versions=first.versions if all(r.versions == first.versions for r in reports.values()) else {},
        runs=[
            Run(
                label=label,
                source=report.source,
                mixer=report.conversion.mixer if report.conversion else None,
                tokens=sum(stage.tokens for stage in report.stages),
                seconds=sum(stage.seconds for stage in report.stages),
                created=report.created,
            )
            for label, report in reports.items()
        ],
        stages=[
            stage.model_copy(update={"name": f"{label}: {stage.name}"})
            for label, report in reports.items()
            for stage in report.stages
        ],
        results=results,
        comparisons=comparisons,
        worst=[],
        samples=[
            sample.model_copy(update={"model": f"{label}: {sample.model}" if sample.model else label})
            for label, report in reports.items()
            for sample in report.samples
        ],
        notes=[f"{label}: {note}" for label, report in reports.items() for note in report.notes],
        command="\n".join(f"{report.command}  # {label}" for label, report in reports.items() if report.command),
    )


def _outcome(result: ModelResult) -> str:
    """Equal for two measurements with the same outcome, whatever they took."""
    scores = {task: [(name, m.value) for name, m in r.metrics.items()] for task, r in sorted(result.tasks.items())}
    spoken = result.language and (result.language.data_sha256, round(result.language.loss, 6))
    return repr((result.name, result.parameters, spoken, scores))
