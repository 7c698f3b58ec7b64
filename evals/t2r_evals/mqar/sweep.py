"""MQAR over mixers, widths and learning rates."""

import multiprocessing
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from t2r_evals.mqar.examples import MqarOptions
from t2r_evals.mqar.training import MqarResult, train
from t2r_evals.report.svg import Series, line_chart

PAPER_LEARNING_RATES = (1e-4, 10**-3.333333, 10**-2.666667, 1e-2)  # logspace(-4, -2, 4)


def sweep(
    build: Callable[[str, int], Any],
    mixers: Sequence[str],
    widths: Sequence[int],
    options: MqarOptions,
    *,
    learning_rates: Sequence[float] = PAPER_LEARNING_RATES,
    device: Any = "cpu",
    jobs: int = 1,
) -> Iterator[MqarResult]:
    """Every model that was trained, as it ends: each mixer and width with each learning rate, from the second rate on,
    which most often suffices. As soon as one reaches `options.enough`, its mixer and width are done: running trainings
    end with their epoch, waiting ones are left out.

    Args:
        build: (mixer, width) -> an untrained model; for `jobs` above 1 it must be importable by other processes.
        jobs: models trained at the same time, each in a process of its own.
    """
    rates = [*learning_rates[1:], *learning_rates[:1]]
    cells = [(mixer, width, lr) for lr in rates for mixer in mixers for width in widths]
    if jobs == 1:
        done: dict[str, bool] = {}
        yield from filter(None, (_train_cell(build, cell, options, device, done) for cell in cells))
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with context.Manager() as manager, ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        shared = manager.dict()
        futures = [pool.submit(_train_cell, build, cell, options, device, shared) for cell in cells]
        yield from filter(None, (future.result() for future in as_completed(futures)))


def best_results(results: Sequence[MqarResult]) -> list[MqarResult]:
    """The best learning rate of each mixer and width."""
    best: dict[tuple[str, int], MqarResult] = {}
    for result in results:
        key = (result.mixer, result.width)
        if key not in best or result.accuracy > best[key].accuracy:
            best[key] = result
    return list(best.values())


def _train_cell(
    build: Callable[[str, int], Any],
    cell: tuple[str, int, float],
    options: MqarOptions,
    device: Any,
    done: MutableMapping[str, bool],
) -> MqarResult | None:
    mixer, width, lr = cell
    row = f"{mixer} {width}"
    if row in done:
        return None
    torch.manual_seed(options.seed)
    result = train(build(mixer, width), options, lr, mixer=mixer, width=width, device=device, stop=lambda: row in done)
    if result.accuracy >= options.enough:
        done[row] = True
    return result


def draw(results: Sequence[MqarResult], options: MqarOptions) -> str:
    """Accuracy against width as SVG, one result per mixer and width."""
    mixers = list(dict.fromkeys(result.mixer for result in results))
    series = []
    for color, mixer in enumerate(mixers):
        mine = sorted((r for r in results if r.mixer == mixer), key=lambda r: r.width)
        series.append(Series(mixer, [r.width for r in mine], [100 * r.accuracy for r in mine], color % 8))
    return line_chart(
        series,
        title=f"MQAR, {options.length} tokens, {options.pairs} pairs: accuracy by width",
        x_label="width (log scale)",
        y_label="accuracy, %",
        x_log=True,
        from_zero=True,
    )


def draw_curves(results: Sequence[MqarResult], options: MqarOptions) -> str:
    """Accuracy over the minutes of training as SVG, one line per model: of the lesson of the moment, then of the
    setting itself."""
    series = []
    for color, result in enumerate(results):
        label = f"{result.mixer}, width {result.width}, {result.lr:.2g}"
        minutes = [epoch.seconds / 60 for epoch in result.curve]
        series.append(Series(label, minutes, [100 * epoch.accuracy for epoch in result.curve], color % 8))
    return line_chart(
        series,
        title=f"MQAR, {options.length} tokens, {options.pairs} pairs: accuracy in training",
        x_label="minutes",
        y_label="accuracy, %",
        from_zero=True,
    )
