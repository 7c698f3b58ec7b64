"""Measure every mixer on the embedded teacher and print the table of docs/mixers.md.

    python docs/measure_mixers.py FOLDER [--only NAME ...] [--tokens 65536]

Each mixer is converted and finetuned by the recipe of the demo with fewer tokens: --tokens to align, half of them to
distill.
FOLDER keeps the runs: a second call goes on where the first stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import MistralConfig

from t2r.convert import convert
from t2r.model import assign_mixers, describe, load, parse_options, student_config
from t2r.publish import CONFIG
from t2r.recipe import RunFolder, load_recipe
from t2r.resources import resolve
from t2r.train import finetune
from t2r.train.documents import read_documents
from t2r_evals.language import measure

MIXERS: dict[str, str] = {
    "softmax, sinks + window": "{name: softmax, sinks: 4, window: 60}",
    "gsa transfer": "{name: gsa}",
    "gsa transfer, half ring": "{name: gsa, ring: 30}",
    "gsa paper": "{name: gsa, style: paper}",
    "hybrid, gsa": "{name: hybrid}",
    "hybrid, gla pooled": "{name: hybrid, recurrent: {name: gla, gate: pooled}}",
    "abc": "{name: abc}",
    "gla": "{name: gla}",
    "gla pooled": "{name: gla, gate: pooled}",
    "retnet": "{name: retnet}",
    "hgrn2": "{name: hgrn2}",
    "mamba2": "{name: mamba2}",
    "linear elu": "{name: linear, map: elu}",
    "linear relu": "{name: linear, map: relu}",
    "linear t2r": "{name: linear, map: t2r}",
    "linear hedgehog": "{name: linear, map: hedgehog}",
    "linear supra": "{name: linear, map: supra}",
}


def size_at_7b(mixer: dict[str, Any]) -> tuple[int, int]:
    """New parameters, and state bytes per sequence, of a Mistral-7B whose layers all have this mixer."""
    host = MistralConfig(sliding_window=None, dtype="bfloat16")
    told = describe(student_config(host, assign_mixers(parse_options(mixer), host.num_hidden_layers)))
    return told["parameters"]["mixer"], told["state_bytes"]


def language_loss(model: Path | str, recipe: Any) -> float:
    """Mean loss on the validation windows, in nats per token."""
    documents = read_documents(recipe.data.validation)
    student, tokenizer = load(model, dtype="auto", device="auto")
    result = measure(student, tokenizer, documents, windows=16, window=recipe.evaluate.window, batch_size=4)
    return result.loss


def run(name: str, mixer: str, folder: Path, tokens: int) -> dict[str, Any]:
    """One mixer's row: {"mixer", "new", "state", "start", "end"}."""
    stored = folder / f"{name.replace(' ', '-').replace(',', '')}.json"
    if stored.is_file():
        return json.loads(stored.read_text())
    output = folder / stored.stem
    silent = [f"stages.{i}.evaluate_every=null" for i in (0, 1)]
    budget = [f"stages.0.tokens={tokens}", f"stages.1.tokens={tokens // 2}"]
    recipe = load_recipe("demo", [f"mixer={mixer}", f"output={output}", *budget, *silent])
    options = recipe.mixer[0]
    runs = RunFolder(recipe)
    runs.claim()
    if not (runs.converted / CONFIG).is_file():
        source, dtype = resolve(recipe.model.source), recipe.model.dtype
        convert(source, runs.converted, mixers=recipe.mixer, dtype=dtype, seed=recipe.seed, command=["measure_mixers"])
    start = language_loss(runs.converted, recipe)
    end = language_loss(finetune(recipe), recipe)
    new, state = size_at_7b(options.stored())
    row = {"mixer": name, "new": new, "state": state, "start": start, "end": end}
    stored.write_text(json.dumps(row))
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument("--tokens", type=int, default=65536)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("demo", [])
    teacher = language_loss(resolve(recipe.model.source), recipe)
    print(f"The teacher's loss: {teacher:.3f}\n")
    print("| mixer | new parameters (7B) | state, MiB per sequence (7B) | loss at start | loss at end |")
    print("|---|---|---|---|---|")
    for name in arguments.only:
        row = run(name, MIXERS[name], arguments.folder, arguments.tokens)
        size = f"{row['new'] / 1e6:.2f} M | {row['state'] / 2**20:.1f}"
        print(f"| {name} | {size} | {row['start']:.3f} | {row['end']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
