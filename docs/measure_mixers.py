"""Measure every mixer and write the table of docs/mixers.md.

    python docs/measure_mixers.py recovery FOLDER [--jobs 10] [--only NAME ...]   # the demo, with another mixer each
    python docs/measure_mixers.py speed FOLDER [--only NAME ...]                  # one layer of a Mistral-7B; a GPU
    python docs/measure_mixers.py table [FOLDER]                                  # what was measured, into mixers.md

FOLDER keeps recovery.json, speed.json and the runs; what is there is not measured again. docs/mixers has the published
two.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig

from t2r.convert import convert
from t2r.model import StudentCache, assign_mixers, describe, load, parse_options, student_config
from t2r.model.sequence import SequenceInfo
from t2r.publish import CONFIG
from t2r.recipe import RunFolder, load_recipe
from t2r.resources import resolve
from t2r.train import finetune
from t2r.train.documents import read_documents
from t2r_evals.language import measure
from t2r_evals.provenance import machine, versions

ROWS: dict[str, dict[str, Any]] = {
    row["name"]: row for row in yaml.safe_load((Path(__file__).parent / "mixers" / "rows.yaml").read_text())
}
TEACHER = "softmax"
PAGE = Path(__file__).parent / "mixers.md"
BEGIN, END = "<!-- table: python docs/measure_mixers.py table -->", "<!-- end of table -->"
TRAINING, LONG = (16, 2048), (1, 32768)  # sequences and their tokens in one call
DECODING = 16  # sequences in a step


def sizes(name: str) -> tuple[int, int, int]:
    """Of a Mistral-7B with the mixer in every layer: new parameters, state bytes of a sequence, and of each token."""
    host = MistralConfig(sliding_window=None, dtype="bfloat16")
    told = describe(student_config(host, assign_mixers(parse_options(ROWS[name]["options"]), host.num_hidden_layers)))
    return told["parameters"]["mixer"], told["state_bytes"], told["kv_bytes_per_token"]


def recover(name: str, folder: Path) -> dict[str, Any]:
    """Losses in nats, over all tokens and over far repeats, before and after the stages of the demo."""
    overrides = [
        f"mixer={json.dumps(ROWS[name]['options'])}",
        f"output={folder / name.replace(', ', '-').replace(' ', '-')}",
    ]
    recipe = load_recipe("demo", overrides + [f"stages.{i}.evaluate_every=null" for i in (0, 1)])
    source = resolve(recipe.model.source)
    if name == TEACHER:
        return {"start": language(source, recipe)}
    runs = RunFolder(recipe)
    runs.claim()
    if not (runs.converted / CONFIG).is_file():
        dtype = recipe.model.dtype
        convert(source, runs.converted, mixers=recipe.mixer, dtype=dtype, seed=recipe.seed, command=["measure_mixers"])
    return {"start": language(runs.converted, recipe), "end": language(finetune(recipe), recipe)}


def language(model: Path | str, recipe: Any) -> dict[str, float]:
    """What the demo's evaluation finds."""
    documents, asked = read_documents(recipe.data.validation), recipe.evaluate
    student, tokenizer = load(model, dtype="auto", device="auto")
    found = measure(student, tokenizer, documents, windows=asked.windows, window=asked.window, batch_size=8)
    assert found.far_repeat_loss is not None
    return {"loss": found.loss, "far_repeats": found.far_repeat_loss}


def time_layer(name: str) -> dict[str, Any]:
    """Milliseconds of the attention's or mixer's whole module, projections included, in bfloat16."""
    host = MistralConfig(sliding_window=None, num_hidden_layers=1, vocab_size=64, dtype="bfloat16")
    options = parse_options(ROWS[name]["options"])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(student_config(host, assign_mixers(options, 1)), dtype=torch.bfloat16)
    found = {}
    for (batch, length), key in ((TRAINING, "train"), (LONG, "train_long")):
        try:
            found[key] = milliseconds(training_step(model, batch, length))
        except torch.cuda.OutOfMemoryError:
            found[key] = None
        torch.cuda.empty_cache()
    return found | {"step": milliseconds(recorded(decoding_step(model, DECODING, TRAINING[1])), repeats=50)}


def training_step(model: Any, batch: int, length: int) -> Callable[[], None]:
    """Forward and backward of one layer's mixer over [batch, length] tokens."""
    layer, arguments = model.model.layers[0].self_attn, call_arguments(model, batch, length, None)
    x = torch.randn(batch, length, model.config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)

    def step() -> None:
        model.zero_grad()
        layer(hidden_states=x, **arguments)[0].backward(upstream)

    return step


def decoding_step(model: Any, batch: int, length: int) -> Callable[[], None]:
    """One token for each of `batch` sequences, after `length` tokens."""
    config, layer = model.config, model.model.layers[0].self_attn
    cache = DynamicCache(config=config) if config.mixers == [None] else StudentCache(config)
    x = torch.randn(batch, length, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(hidden_states=x, past_key_values=cache, **call_arguments(model, batch, length, None))
    seen = torch.full((batch,), length, device="cuda")
    arguments = call_arguments(model, batch, 1, seen)

    @torch.no_grad()
    def step() -> None:
        layer(hidden_states=x[:, :1], past_key_values=cache, **arguments)

    return step


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A step as a CUDA graph, which a student's `generate` makes of all its layers together."""
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def call_arguments(model: Any, batch: int, length: int, seen: torch.Tensor | None) -> dict[str, Any]:
    """What a student's model hands to its layers."""
    info = SequenceInfo.build(batch, length, torch.device("cuda"), seen=seen)
    rotary = model.model.rotary_emb(torch.empty(0, device="cuda", dtype=torch.bfloat16), info.position)
    return {"position_embeddings": rotary, "attention_mask": None if model.config.mixers == [None] else info}


def milliseconds(call: Callable[[], None], repeats: int = 10) -> float:
    """Median time of a call on the GPU, after three to warm up."""
    times = []
    for _ in range(3 + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def take(kind: str, name: str, folder: Path) -> dict[str, Any]:
    """One measurement, and where it was taken."""
    found = recover(name, folder) if kind == "recovery" else time_layer(name)
    return {"machine": machine(), "versions": versions()} | found


def load_rows(kind: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The rows measured so far, by mixer."""
    path = folder / f"{kind}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def add_row(kind: str, folder: Path, name: str, measured: dict[str, Any]) -> None:
    """Keep one more row, in the order of the table."""
    rows = load_rows(kind, folder) | {name: measured}
    (folder / f"{kind}.json").write_text(json.dumps({key: rows[key] for key in ROWS if key in rows}, indent=1) + "\n")
    print(name, {key: value for key, value in measured.items() if key not in ("machine", "versions")}, flush=True)


def table(folder: Path) -> str:
    """Everything that the folder holds, and where it was measured."""
    found = {kind: load_rows(kind, folder) for kind in ("recovery", "speed")}
    teacher = found["recovery"].get(TEACHER, {}).get("start")
    lines = [
        "| mixer | computes | starts as | new parameters | state per sequence | demo: loss | demo: far repeats "
        "| forward + backward, 16 x 2,048 / 1 x 32,768 | decoding step | choose it |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in ROWS.items():
        new, state, per_token = sizes(name)
        memory = f"{per_token:,} B per token" if per_token else f"{state:,} B"
        losses, times = found["recovery"].get(name, {}), found["speed"].get(name, {})
        shown = [" / ".join(duration(times, key) for key in keys) for keys in (("train", "train_long"), ("step",))]
        if name == TEACHER:
            recovered = ["", ""]
        else:
            recovered = [above(losses, teacher, key) for key in ("loss", "far_repeats")]
        cells = [f"`{name}`", row["computes"], row["start"], f"{new:,}", memory, *recovered, *shown, row["choose"]]
        lines.append(f"| {' | '.join(cells)} |")
    if teacher:
        lines += ["", f"The teacher's loss is {teacher['loss']:.3f}, on far repeats {teacher['far_repeats']:.3f}."]
    return "\n".join([*lines, *(place(kind, rows) for kind, rows in found.items() if rows)])


def above(losses: dict[str, Any], teacher: dict[str, float] | None, key: str) -> str:
    """A loss before and after the demo, above the teacher's."""
    if teacher is None or "end" not in losses:
        return ""
    return " → ".join(f"+{losses[when][key] - teacher[key]:.3f}" for when in ("start", "end"))


def duration(times: dict[str, Any], key: str) -> str:
    """A time, or why there is none."""
    if key not in times:
        return ""
    if times[key] is None:
        return "no memory"
    return f"{times[key]:.2f} ms" if times[key] >= 1 else f"{1000 * times[key]:.0f} µs"


def place(kind: str, rows: dict[str, dict[str, Any]]) -> str:
    """Where a column was measured."""
    places = {
        f"{row['machine'].get('GPU') or row['machine']['processor']}, {row['machine']['cores']} CPU cores, torch "
        f"{row['versions']['torch']}, triton {row['versions'].get('triton')}"
        for row in rows.values()
    }
    return f"{kind.capitalize()} measured on: {'; '.join(sorted(places))}."


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["recovery", "speed", "table"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "mixers")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=1, help="mixers measured at the same time; for times, one")
    arguments = parser.parse_args()
    if arguments.kind == "table":
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(arguments.folder)}\n{END}{rest.split(END)[1]}")
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in arguments.only if name not in load_rows(arguments.kind, arguments.folder)]
    if arguments.jobs == 1:
        for name in wanted:
            add_row(arguments.kind, arguments.folder, name, take(arguments.kind, name, arguments.folder))
        return
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    context = get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(take, arguments.kind, name, arguments.folder): name for name in wanted}
        for future in as_completed(futures):
            add_row(arguments.kind, arguments.folder, futures[future], future.result())


if __name__ == "__main__":
    main()
