"""Print a plan."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t2r.convert.card import mixer_table
from t2r.convert.folding import fold_layers
from t2r.convert.plan import Plan

_WIDTH_OF_A_FILE = 140
_STYLES = {"copied": "", "transformed": "cyan", "new": "green", "dropped": "yellow"}


def print_plan(plan: Plan, console: Console) -> None:
    """Every tensor by name (layers that agree share a row), then parameters, bytes and state."""
    record = plan.to_json()
    table = Table(box=box.SIMPLE_HEAD, title=f"Plan: {escape(plan.checkpoint.name)}", title_justify="left")
    for column in ("tensor", "action", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    for column in ("count", "MB"):
        table.add_column(column, justify="right")
    table.add_column("note", overflow="fold")
    rows = [(t.name, (t.action, t.shape, t.dtype, t.nbytes, t.note)) for t in (*plan.tensors, *plan.dropped)]
    for name, count, (action, shape, dtype, nbytes, note) in fold_layers(rows):
        size = " x ".join(map(str, shape))
        table.add_row(escape(name), action, size, dtype, str(count), f"{count * nbytes / 1e6:,.1f}", escape(note),
                      style=_STYLES[action])  # fmt: skip
    console.print(table)
    for layers, mixer in mixer_table(list(plan.config.mixers)):
        console.print(f"layers {layers}: {mixer}", highlight=False, markup=False)
    before, after = record["parameters_before"], record["parameters_after"]
    console.print(f"parameters {before:,} -> {after:,} ({after - before:,} new)", highlight=False)
    print_state(record["state"], console)
    shards = f"{len(plan.shards)} file{'s' if len(plan.shards) > 1 else ''}"
    console.print(
        f"weights {record['bytes_before'] / 1e9:.3f} GB -> {plan.nbytes / 1e9:.3f} GB in {shards}", highlight=False
    )
    if plan.ignored_config_keys:
        console.print(f"config.json keys left behind: {', '.join(plan.ignored_config_keys)}", markup=False)


def print_init_report(report: Mapping[str, Any], console: Console) -> None:
    """What the untrained student loses (t2r.convert.calibrate), layer by layer and in all."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Before training, on {report['tokens']:,} tokens", title_justify="left")
    table.add_column("layer")
    table.add_column("mixer")
    table.add_column("output error", justify="right")
    table.add_column("KL, it alone converted", justify="right")
    for row in report["layers"]:
        table.add_row(str(row["layer"]), row["mixer"], f"{row['output_error']:.4f}", f"{row['kl_alone']:.4f}")
    console.print(table)
    above = report["loss"] - report["teacher_loss"]
    console.print(
        f"loss {report['loss']:.4f}, {above:+.4f} against the teacher's {report['teacher_loss']:.4f}; "
        f"KL {report['kl']:.4f}",
        highlight=False,
    )


def make_console() -> Console:
    """A console on standard output that does not fold its tables to 80 columns when that is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_FILE)


def print_state(description: Mapping[str, Any], console: Console) -> None:
    """The memory of one sequence: the mixers' state against the teacher's KV cache (t2r.model.describe)."""
    state, per_token = description["state_bytes"], description["teacher_kv_bytes_per_token"]
    left = description["kv_bytes_per_token"]
    if left == per_token:
        console.print(f"KV cache {per_token:,} bytes per token", highlight=False)
        return
    grows = f" + {left:,} bytes per token in the untouched layers" if left else ""
    console.print(
        f"state per sequence {state:,} bytes{grows}; teacher's KV cache {per_token:,} bytes per token "
        f"(as much after {state / (per_token - left):.0f} tokens)",
        highlight=False,
        soft_wrap=True,
    )
