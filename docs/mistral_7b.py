"""Write the tables of docs/mistral-7b.md from what `t2r bench train` and `t2r bench decode` measured.

python docs/mistral_7b.py [--price 3.5]      # reads docs/mistral-7b/*.json and the shipped recipes
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2r.cli.bench_config import MISTRAL_7B
from t2r.recipe import load_recipe
from t2r_evals.speed import crossover

PAGE = Path(__file__).parent / "mistral-7b.md"
FOLDER = Path(__file__).parent / "mistral-7b"
CURVES = "curves.json"
DECODING = "decode.json"
PLACING = "place.json"
BY_HEAD = ("train-by-head.json", "decode-by-head.json")
RECIPES = ("gsa-mistral-7b-lora", "gsa-mistral-7b", "gsa-mistral-7b-paper")
GPUS = (1, 8, 64)
PRICE = 3.5
Row = dict[str, Any]


def measured() -> Iterator[Row]:
    """Every row of every file, with the run's own facts."""
    for path in sorted(FOLDER.glob("*.json")):
        if path.name in (CURVES, DECODING, PLACING, *BY_HEAD) or path in _slices():
            continue
        record = json.loads(path.read_text())
        for row in record["rows"]:
            facts = {key: record[key] for key in ("processes", "machine", "versions", "matrix_flops_per_second")}
            yield {**row, **facts, "gather": record["options"].get("gather"), "layers": record["options"]["layers"]}


def pick(rows: list[Row], **wanted: Any) -> Row | None:
    """The fastest row with these values that did fit."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items()) and "mfu" in row]
    return max(found, key=lambda row: row["tokens_per_second"], default=None)


def one_gpu(rows: list[Row]) -> list[str]:
    lines = ["| stage | trained | row | micro-batch | checkpointing | tokens/s | MFU | peak memory |"]
    lines += ["|---|---|---:|---:|---|---:|---:|---:|"]
    order = {"finetune": 0, "distill": 1, "align": 2}
    chosen = [row for row in rows if row["processes"] == 1 and row["layers"] is None and row["fused"]]
    best = {
        (row["stage"], row["train"], row["length"], row["micro_batch_size"], row["gradient_checkpointing"]): row
        for row in chosen
    }
    for row in sorted(best.values(), key=lambda row: (order[row["stage"]], row["train"], row["length"])):
        start = (
            f"| {row['stage']} | {row['train']} | {row['length']:,} | {row['micro_batch_size']} rows "
            f"| {'yes' if row['gradient_checkpointing'] else 'no'} |"
        )
        if "mfu" not in row:
            lines.append(f"{start} does not fit | | |")
            continue
        lines.append(
            f"{start} {row['tokens_per_second']:,.0f} | {100 * row['mfu']:.1f}% | {row['peak_bytes'] / 2**30:.1f} GiB |"
        )
    return lines


def two_gpus(rows: list[Row]) -> list[str]:
    lines = [
        "| GPUs | weights gathered in | micro-batch per GPU | checkpointing | tokens/s | to one GPU | MFU "
        "| peak memory per GPU |",
        "|---:|---|---:|---|---:|---:|---:|---:|",
    ]
    wanted = {"stage": "finetune", "train": "full", "length": 2048, "layers": None, "fused": True}
    alone = pick(rows, processes=1, **wanted)
    for row in [r for r in rows if r["processes"] > 1 and all(r[k] == v for k, v in wanted.items()) and "mfu" in r]:
        lines.append(
            f"| {row['processes']} | {row['gather']} | {row['micro_batch_size']} x {row['length']:,} "
            f"| {'yes' if row['gradient_checkpointing'] else 'no'} | {row['tokens_per_second']:,.0f} "
            f"| {row['tokens_per_second'] / alone['tokens_per_second']:.2f} | {100 * row['mfu']:.1f}% "
            f"| {row['peak_bytes'] / 2**30:.1f} GiB |"
            if alone
            else "| |"
        )
    return lines


def fused(rows: list[Row]) -> list[str]:
    lines = ["| 4 layers, 2,048 tokens | unfused | liger-kernel | |", "|---|---:|---:|---:|"]
    for stage in ("finetune", "distill", "align"):
        pair = [pick(rows, stage=stage, train="full", length=2048, layers=4, fused=on) for on in (False, True)]
        if pair[0] and pair[1]:
            slow, fast = (row["tokens_per_second"] for row in pair)
            lines.append(f"| {stage}, tokens/s | {slow:,.0f} | {fast:,.0f} | {fast / slow:.2f} x |")
    return lines


def costs(rows: list[Row], price: float) -> list[str]:
    """Hours and cost of each recipe, a stage's rate measured at its own row length or the nearest there is."""
    scaling = efficiency(rows)
    if math.isnan(scaling):
        return ["Not measured yet: two GPUs."]
    header = " | ".join(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS)
    lines = [f"| recipe, stage | tokens | tokens/s of one GPU | {header} |", "|---|---:|---:|" + "---:|" * len(GPUS)]
    for name in RECIPES:
        recipe = load_recipe(name)
        total = dict.fromkeys(GPUS, 0.0)
        for stage in recipe.stages:
            train = "lora" if stage.adapter else "full"
            lengths = {row["length"] for row in rows if row["stage"] == stage.kind and row["train"] == train}
            length = min(lengths, key=lambda found: abs(found - stage.sequence_length), default=0)
            row = pick(rows, stage=stage.kind, train=train, length=length, processes=1, layers=None, fused=True)
            if row is None:
                lines.append(f"| {name}, {stage.kind} | {stage.tokens / 1e6:,.0f}M | not measured | | | |")
                total = dict.fromkeys(GPUS, float("nan"))
                continue
            cells = []
            for gpus in GPUS:
                hours = stage.tokens / row["tokens_per_second"] / gpus / (scaling if gpus > 1 else 1) / 3600
                total[gpus] += hours
                few = stage.batch_tokens < gpus * row["micro_batch_size"] * row["length"]
                cells.append(f"{_hours(hours)}{' *' if few else ''}")
            rate = f"{row['tokens_per_second']:,.0f}, rows of {length:,}"
            lines.append(f"| {name}, {stage.kind} | {stage.tokens / 1e6:,.0f}M | {rate} | {' | '.join(cells)} |")
        cells = [f"**{_hours(total[gpus])}, ${total[gpus] * gpus * price:,.0f}**" for gpus in GPUS]
        lines.append(f"| **{name}** | {sum(s.tokens for s in recipe.stages) / 1e6:,.0f}M | | {' | '.join(cells)} |")
    return lines


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def efficiency(rows: list[Row]) -> float:
    """Tokens/s of two GPUs over twice those of one, the same batch for each and the recipes' fp32 gathered."""
    wanted = {
        "stage": "finetune",
        "train": "full",
        "length": 2048,
        "layers": None,
        "fused": True,
        "micro_batch_size": 8,
    }
    one, two = (pick(rows, processes=n, gradient_checkpointing=True, gather="fp32", **wanted) for n in (1, 2))
    return two["tokens_per_second"] / one["tokens_per_second"] / 2 if one and two else float("nan")


def decoding() -> dict[tuple[str, int], list[Row]]:
    """Teacher and student with 64 slots in every head, as `by_context` has them."""
    return by_context(json.loads((FOLDER / DECODING).read_text())["rows"])


def by_context(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows of one model and context: batch 1, then the largest."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if not row.get("launched"):
            found.setdefault((row["model"], row["context"]), []).append(row)
    return found


def one_sequence() -> list[str]:
    lines = ["| context | | first token | prefill, tokens/s | `generate`, tokens/s | one step | cache | peak memory |"]
    lines += ["|---:|---|---:|---:|---:|---:|---:|---:|"]
    rows = decoding()
    for context in sorted({context for _, context in rows}):
        for model in ("teacher", "student"):
            row = rows[model, context][0]
            lines.append(
                f"| {f'{context:,}' if model == 'teacher' else ''} | {model} "
                f"| {1000 * row['first_token_seconds']:,.0f} ms "
                f"| {row['prefill_tokens_per_second']:,.0f} | {row['decode_tokens_per_second']:,.1f} "
                f"| {1000 * row['step_seconds']:.2f} ms | {_bytes(row['state_bytes'])} | {_bytes(row['peak_bytes'])} |"
            )
    return lines


def many_sequences() -> list[str]:
    lines = ["| context | teacher: sequences | tokens/s | cache | student: sequences | tokens/s | states | ratio |"]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|---:|"]
    rows = decoding()
    contexts = sorted({context for _, context in rows})
    for context in contexts:
        # a student's many sequences are measured once, at the first context
        pair = [rows["teacher", context][-1], max(rows["student", contexts[0]], key=lambda row: row["batch"])]
        cells = [f"{row['batch']:,} | {row['tokens_per_second']:,.0f} | {_bytes(row['state_bytes'])}" for row in pair]
        ratio = pair[1]["tokens_per_second"] / pair[0]["tokens_per_second"]
        lines.append(f"| {context:,} | {' | '.join(cells)} | {ratio:.1f} x |")
    return lines


def crossings() -> list[str]:
    """From which context on the student is ahead, of what one sequence costs."""
    rows = decoding()
    contexts = sorted({context for _, context in rows})
    lines = ["| the student is ahead from | context |", "|---|---:|"]
    measures = {
        "first token": lambda row: row["first_token_seconds"],
        "decoding by `generate`": lambda row: 1 / row["decode_tokens_per_second"],
        "one step by itself": lambda row: row["step_seconds"],
        "peak memory": lambda row: row["peak_bytes"],
    }
    for name, measure in measures.items():
        student, teacher = ([measure(rows[model, n][0]) for n in contexts] for model in ("student", "teacher"))
        found = crossover(contexts, student, teacher)
        said = "not up to " + f"{contexts[-1]:,}" if found is None else f"{found:,.0f}"
        lines.append(f"| {name} | {'at most ' if found == contexts[0] else ''}{said} |")
    return lines


def launched() -> list[str]:
    """What the graph brings, and what the student's step costs beyond the teacher's at the first context."""
    (slow,) = (row for row in json.loads((FOLDER / DECODING).read_text())["rows"] if row.get("launched"))
    rows, context = decoding(), slow["context"]
    teacher, student = (rows[model, context][0] for model in ("teacher", "student"))
    layers = MISTRAL_7B["num_hidden_layers"]
    more = student["step_seconds"] - teacher["step_seconds"]
    return [
        f"At {context:,} tokens the student's `generate` without the graph (`disable_compile=True`) reaches "
        f"{slow['decode_tokens_per_second']:,.1f} tokens/s: the graph is worth "
        f"{student['decode_tokens_per_second'] / slow['decode_tokens_per_second']:.1f} x. Its step by itself takes "
        f"{1000 * more:.1f} ms more than the teacher's there, {1e6 * more / layers:.0f} µs in each of {layers} layers "
        f"for gates and recurrence. Launched alike, kernel by kernel, the teacher's step takes "
        f"{1000 / teacher['decode_tokens_per_second']:.0f} ms and the student's "
        f"{1000 / slow['decode_tokens_per_second']:.0f}. The teacher's is that of lengths which the process has seen "
        "before, in the warm-up: for each new length of its keys cuDNN's attention makes a plan, 37 ms at every token "
        "of a first generation (`torch.backends.cuda.enable_cudnn_sdp(False)` spares it)."
    ]


def _bytes(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.0f} MiB"


def placing() -> list[str]:
    """What `docs/measure_placement.py` measured."""
    record = json.loads((FOLDER / PLACING).read_text())
    options = record["options"]
    return [
        f"Placing slots by head (`place` in a recipe, `--place` of `t2r convert`) took {record['seconds']:.1f} s for "
        f"{options['windows']} windows of {options['window']:,} tokens, and {_bytes(record['peak_bytes'])} in all, "
        f"{_bytes(record['weight_bytes'])} of them weights; reading the teacher from a disk comes on top."
    ]


def by_head(rows: list[Row]) -> list[str]:
    """Heads with different numbers of slots beside the same number in each."""
    wanted = {"stage": "finetune", "train": "full", "length": 2048}
    placed, decoded = (json.loads((FOLDER / name).read_text()) for name in BY_HEAD)
    students = {
        "64 in every head": (pick(rows, processes=1, layers=None, fused=True, **wanted), decoding()),
        placed["options"]["mixer"].partition("slots=")[2]: (
            pick(placed["rows"], **wanted),
            by_context(decoded["rows"]),
        ),
    }
    lines = ["| slots | finetune, tokens/s | MFU | peak memory | one step | sequences | tokens/s | states |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, (row, steps) in students.items():
        assert row is not None
        one, *_, many = sorted(steps["student", 1024], key=lambda step: step["batch"])
        lines.append(
            f"| {name} | {row['tokens_per_second']:,.0f} | {100 * row['mfu']:.1f}% "
            f"| {row['peak_bytes'] / 2**30:.1f} GiB | {1000 * one['step_seconds']:.2f} ms "
            f"| {many['batch']:,} | {many['tokens_per_second']:,.0f} | {_bytes(many['state_bytes'])} |"
        )
    return lines


def _slices() -> list[Path]:
    """Runs of four layers by how many sizes the heads of a layer have."""
    return sorted(FOLDER.glob("slots-*.json"))


def sizes() -> list[str]:
    """What each further size in a layer costs."""
    lines = ["| 4 layers, 2,048 tokens: slots | sizes | finetune, tokens/s | |", "|---|---:|---:|---:|"]
    fastest = 0.0
    for path in _slices():
        record = json.loads(path.read_text())
        slots = record["options"]["mixer"].partition("slots=")[2]
        rate = record["rows"][0]["tokens_per_second"]
        fastest = max(fastest, rate)
        lines.append(
            f"| {slots if '[' in slots else f'{slots} in every head'} | {len(set(slots.strip('[]').split(',')))} "
            f"| {rate:,.0f} | {rate / fastest:.2f} x |"
        )
    return lines


def curves() -> list[str]:
    """Runs of docs/mistral-7b/fsdp.yaml, each beside the same stage and precision on one GPU."""
    lines = ["| precision | stage | run | validation loss | largest relative difference of a step's loss |"]
    lines += ["|---|---|---|---:|---:|"]
    for run in json.loads((FOLDER / CURVES).read_text()):
        difference = run["largest_relative_difference"]
        lines.append(
            f"| {run['precision']} | {run['stage']} | {run['run']} | {run['validation_loss']:.4f} "
            f"| {f'{difference:.1e}' if difference else ''} |"
        )
    return lines


def machine(rows: list[Row]) -> list[str]:
    names = ("torch", "triton", "transformers", "accelerate", "peft")
    row = rows[0]
    versions = ", ".join(f"{name} {row['versions'][name]}" for name in names if name in row["versions"])
    rates = [r["matrix_flops_per_second"] / 1e12 for r in rows]
    return [
        f"{row['machine']['GPU'].split(' x ')[-1]}; {versions}; liger-kernel 0.8.5. bf16 matrix product in the same "
        f"runs: {min(rates):.0f} to {max(rates):.0f} TFLOP/s."
    ]


def tables(price: float) -> dict[str, list[str]]:
    """Every table of the page by the name of its marker."""
    rows = list(measured())
    return {
        "machine": machine(rows),
        "one": one_gpu(rows),
        "two": two_gpus(rows),
        "fused": fused(rows),
        "costs": costs(rows, price),
        "price": [
            f"A GPU-hour is taken as ${price:.2f}. Two GPUs reached {efficiency(rows):.3f} of twice one GPU's rate."
        ],
        "curves": curves(),
        "one-sequence": one_sequence(),
        "many-sequences": many_sequences(),
        "crossings": crossings(),
        "launched": launched(),
        "placing": placing(),
        "by-head": by_head(rows),
        "sizes": sizes(),
    }


def written(page: str, price: float) -> str:
    """The page with its tables."""
    for name, lines in tables(price).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, page, flags=re.DOTALL), name
        body = "\n".join(lines)
        page = re.sub(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", page, flags=re.DOTALL)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--price", type=float, default=PRICE, help="dollars for an hour of one GPU (an assumption)")
    PAGE.write_text(written(PAGE.read_text(), parser.parse_args().price))


if __name__ == "__main__":
    main()
