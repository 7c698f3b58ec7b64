"""How much of a teacher comes back, row by row: run recipes that differ in one thing, and print the table.

    python evals/recovery.py --teacher DIR --train TEXT --validation TEXT [--only gsa,window] [--seeds 0,1,2]

A row of the table file (evals/recovery.yaml) is a name, a recipe and overrides of it, as `t2r run` takes them. Every
row and seed is one run in OUTPUT/ROW/seed-N with its log, its recipe and its report; the last lines are the medians
over the seeds. What is finished and verified is kept, so the same command goes on after an interruption.

Runs are spread over --gpus, --parallel at a time; each worker imports torch and compiles kernels once.

    python evals/recovery.py --render RESULTS.jsonl ... --output DIR

runs nothing: table and figure of stored results.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """One run: a row of the table with one seed."""

    row: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    places: tuple[str, ...]
    folder: Path

    @property
    def arguments(self) -> list[str]:
        """What `t2r run` is called with."""
        return [self.recipe, *self.overrides, *self.places, f"seed={self.seed}", f"output={self.folder}"]


def read_table(path: Path) -> dict[str, Record]:
    """Rows by name: {"recipe": name or file, "overrides": [key=value, ...], "about": one line, "curve": the line that
    the row is a point of in the figure of loss against state}.

    Raises:
        SystemExit: a row with other keys, or a name twice.
    """
    rows: dict[str, Record] = {}
    for row in yaml.safe_load(path.read_text()):
        unknown = set(row) - {"name", "about", "curve", "recipe", "overrides"}
        if unknown or row["name"] in rows:
            sys.exit(f"{path}: row {row['name']}: {'unknown key ' + min(unknown) if unknown else 'is there twice'}")
        rows[row["name"]] = {"recipe": "recovery", "overrides": [], "about": "", **row}
    return rows


def measured(job: Job, seconds: float) -> Record:
    """What a finished run's report says, losses above the teacher in nats per token."""
    report = json.loads((job.folder / "report.json").read_text())
    language = {result["name"]: result["language"] for result in report["results"]}
    teacher, student, start = language["teacher"], language["student"], language.get("no training")
    record = {
        "row": job.row,
        "seed": job.seed,
        "teacher": teacher["loss"],
        "teacher_far": teacher["far_repeat_loss"],
        "excess": student["loss"] - teacher["loss"],
        "excess_far": student["far_repeat_loss"] - teacher["far_repeat_loss"],
        "kl": student["kl_to_teacher"],
    }
    if start is not None:
        record["start"] = start["loss"] - teacher["loss"]
        record["start_far"] = start["far_repeat_loss"] - teacher["far_repeat_loss"]
    record["state_bytes"] = next(r["state_bytes"] for r in report["results"] if r["name"] == "student")
    record["tokens"] = sum(stage["tokens"] for stage in report["stages"])
    record["tokens_per_second"] = {stage["name"]: stage["tokens_per_second"] for stage in report["stages"]}
    record["device"] = report["stages"][-1]["device"]
    return {**record, "seconds": round(seconds, 1), "overrides": list(job.overrides)}


def one_line(record: Record) -> str:
    """A finished run on one line."""
    if "error" in record:
        return f"{record['row']:28} seed {record['seed']}  FAILED: {record['error']}"
    start = f"start {record['start']:+.4f}/{record['start_far']:+.3f}  " if "start" in record else ""
    rates = " ".join(f"{name} {rate / 1e3:.0f}k/s" for name, rate in record["tokens_per_second"].items() if rate)
    return (
        f"{record['row']:28} seed {record['seed']}  {start}excess {record['excess']:+.4f}  "
        f"far {record['excess_far']:+.4f}  {rates}  {record['seconds']:.0f} s"
    )


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send this process's standard output and error, those of its children too, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(number) for number in (1, 2)]
    with open(path, "a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)


def work(gpu: str | None, jobs: Any, done: Any) -> None:
    """A worker: carries out jobs on one GPU until there is none left."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    while (job := jobs.get()) is not None:
        began = time.perf_counter()
        with output_to(job.folder.with_suffix(".log")):
            try:
                run(job)
                record = measured(job, time.perf_counter() - began)
            except BaseException as error:  # a job that fails is a line of the table, and the next one runs
                traceback.print_exc()
                record = {"row": job.row, "seed": job.seed, "error": f"{type(error).__name__}: {error}"}
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    done.put(record)
                    raise
        done.put(record)


def run(job: Job) -> None:
    """`t2r run` in this process."""
    import gc

    import torch

    from t2r.cli.run import command

    command.main(job.arguments, prog_name="t2r run", standalone_mode=False)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_all(jobs: list[Job], *, gpus: list[str] | None, parallel: int, results: Path) -> list[Record]:
    """Carry out the jobs, `parallel` at a time per GPU; every record is printed and appended to `results` at once."""
    context = multiprocessing.get_context("spawn")
    waiting, done = context.Queue(), context.Queue()
    devices: list[str | None] = [*gpus] if gpus else [None]
    places = [device for device in devices for _ in range(parallel)][: len(jobs)]
    for job in [*jobs, *(None for _ in places)]:
        waiting.put(job)
    workers = [context.Process(target=work, args=(gpu, waiting, done)) for gpu in places]
    records: list[Record] = []
    try:
        for worker in workers:
            worker.start()
        while len(records) < len(jobs) and (any(worker.is_alive() for worker in workers) or not done.empty()):
            with contextlib.suppress(Exception):  # queue.Empty
                record = done.get(timeout=1)
                records.append(record)
                with open(results, "a") as file:
                    file.write(json.dumps(record) + "\n")
                print(one_line(record), flush=True)
    finally:
        for worker in workers:
            if len(records) < len(jobs):
                worker.terminate()
            worker.join()
    return records


def table(records: list[Record], rows: dict[str, Record]) -> str:
    """Medians over the seeds, as Markdown; in brackets the lowest and the highest of several."""
    lines = [
        "| row | what | stages | seeds | loss at start | excess | excess, far repeats | state, KiB |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        runs = [record for record in records if record["row"] == name and "error" not in record]
        if not runs:
            continue
        start = f"{statistics.median(r['start'] for r in runs):+.3f}" if "start" in runs[0] else ""
        stages = ", ".join(stage.partition("-")[2] for stage in runs[0]["tokens_per_second"])
        state = runs[0]["state_bytes"]
        cells = [name, row["about"], stages, str(len(runs)), start]
        cells += [spread([record[key] for record in runs]) for key in ("excess", "excess_far")]
        lines.append(f"| {' | '.join([*cells, f'{state / 1024:.0f}' if state else ''])} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The median, and the range of several."""
    text = f"{statistics.median(values):+.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):+.3f} .. {max(values):+.3f})"


def figure(records: list[Record], rows: dict[str, Record]) -> str | None:
    """Excess against state bytes as SVG, a line for each `curve` of the table; None without two points on one."""
    from t2r_evals.report.svg import Series, line_chart, standalone

    points: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        runs = [record for record in records if record["row"] == name and "error" not in record]
        if runs and row.get("curve"):
            state = runs[0]["state_bytes"] / 1024
            for key, what in (("excess", ""), ("excess_far", ", far repeats")):
                value = statistics.median(record[key] for record in runs)
                points.setdefault(f"{row['curve']}{what}", []).append((state, value))
    series = [
        Series(label, [state for state, _ in sorted(found)], [loss for _, loss in sorted(found)], color=1 + index)
        for index, (label, found) in enumerate(points.items())
        if len(found) > 1
    ]
    if not series:
        return None
    return standalone(
        line_chart(
            series,
            title="Loss above the teacher by state",
            x_label="state per sequence, KiB (log scale)",
            y_label="nats above the teacher",
            x_log=True,
            x_format=lambda value: f"{value:.0f}",
            y_format=lambda value: f"{value:.2f}",
            from_zero=True,
        )
    )


def write_outputs(records: list[Record], rows: dict[str, Record], output: Path) -> str:
    """table.md and, where the rows make one, state.svg; returns the table."""
    text = table(records, rows)
    (output / "table.md").write_text(text + "\n")
    if (svg := figure(records, rows)) is not None:
        (output / "state.svg").write_text(svg)
    return text


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=HERE / "recovery.yaml", help="rows; default: %(default)s")
    parser.add_argument("--teacher", help="folder or Hub id; default: what the recipe says")
    parser.add_argument("--train", help="training text; default: what the recipe says")
    parser.add_argument("--validation", help="validation text; default: what the recipe says")
    parser.add_argument("--output", type=Path, default=Path("runs/recovery"), help="default: %(default)s")
    parser.add_argument("--results", type=Path, help="JSON lines, one per run; default: OUTPUT/results.jsonl")
    parser.add_argument("--only", type=names, help="rows to run, with commas; default: all")
    parser.add_argument("--seeds", type=names, default=["0", "1", "2"], help="default: 0,1,2")
    parser.add_argument("--runs", type=names, metavar="ROW/SEED,...", help="exactly these, in this order")
    parser.add_argument("--gpus", type=names, default=None, help="CUDA devices, with commas; default: as they are")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on each GPU; default: %(default)s")
    parser.add_argument("--render", type=Path, nargs="+", metavar="RESULTS", help="run nothing; render stored results")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for every row")
    options = parser.parse_args()
    rows = read_table(options.table)
    for name in options.only or []:
        if name not in rows:
            sys.exit(f"--only {name}: no such row in {options.table}; rows are {', '.join(rows)}")
    rows = {name: rows[name] for name in options.only or rows}
    places = {
        "model.source": options.teacher,
        "data.source": options.train,
        "data.validation.source": options.validation,
    }
    given = tuple(f"{key}={value}" for key, value in places.items() if value)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if options.render:
        lines = [line for path in options.render for line in path.read_text().splitlines()]
        print(write_outputs([json.loads(line) for line in lines], rows, output))
        return
    # One seed of every row before the second of any.
    wanted = options.runs or [f"{name}/{seed}" for seed in options.seeds for name in rows]
    jobs = []
    for run_name in wanted:
        name, _, seed = run_name.rpartition("/")
        if name not in rows:
            sys.exit(f"{run_name}: no such row; rows are {', '.join(rows)}")
        overrides = (*rows[name]["overrides"], *options.set)
        jobs.append(Job(name, int(seed), rows[name]["recipe"], overrides, given, output / name / f"seed-{seed}"))
    results = options.results or output / "results.jsonl"
    began = time.perf_counter()
    records = run_all(jobs, gpus=options.gpus, parallel=options.parallel, results=results)
    text = write_outputs(records, rows, output)
    print(f"\n{text}\n\n{len(records)} runs in {time.perf_counter() - began:.0f} s; {results}")
    if len(records) < len(jobs) or any("error" in record for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
