"""What a stage tells while it trains: log.jsonl always, a bar on a terminal, plain lines elsewhere."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from t2r.recipe import Stage
from t2r.recipe.counts import format_count

_LINE_SECONDS = 10.0


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class ProgressCallback(TrainerCallback):
    """Writes log.jsonl and shows progress.

    Args:
        path: log.jsonl; lines after `step` are dropped, so that a resumed run leaves one curve.
        title: what the bar is called.
        step: the step that the run goes on from.
    """

    def __init__(self, stage: Stage, path: Path, *, title: str, step: int) -> None:
        self._stage = stage
        self._path = path
        self._title = title
        kept = [line for line in read_log(path) if line["step"] <= step]
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._first = step
        self._bar: tqdm | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._seconds_before + time.perf_counter() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._shown = time.perf_counter()
        self._last = (state.global_step, self._began)
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._stage.steps * self._stage.batch_tokens,
                initial=state.global_step * self._stage.batch_tokens,
                desc=self._title,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._stage.batch_tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" not in logs and "validation_loss" not in logs:
            return
        line: dict[str, Any] = {"step": state.global_step, "tokens": state.global_step * self._stage.batch_tokens}
        if "loss" in logs:
            now, (step, then) = time.perf_counter(), self._last
            rate = (state.global_step - step) * self._stage.batch_tokens / max(now - then, 1e-9)
            self._last = (state.global_step, now)
            line |= {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
            line |= {"tokens_per_second": round(rate, 1)}
        if "validation_loss" in logs:
            line["validation_loss"] = logs["validation_loss"]
        line["seconds"] = round(self.seconds, 3)
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        if self._bar is not None:
            shown = {key: f"{line[key]:.4f}" for key in ("loss", "validation_loss") if key in line}
            self._bar.set_postfix(shown)
            return
        now, last = time.perf_counter(), line["step"] == self._stage.steps
        if now - self._shown < _LINE_SECONDS and "validation_loss" not in line and not last:
            return
        self._shown = now
        done = (line["step"] - self._first) / max(1, self._stage.steps - self._first)
        left = (now - self._began) * (1 - done) / max(done, 1e-9)
        parts = [f"{self._title} step {line['step']}/{self._stage.steps}", f"{format_count(line['tokens'])} tokens"]
        parts += [f"{key.replace('_', ' ')} {line[key]:.4f}" for key in ("loss", "validation_loss") if key in line]
        if "tokens_per_second" in line:
            parts += [f"{line['tokens_per_second']:.0f} tokens/s", f"{left:.0f} s left"]
        print(", ".join(parts), file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
