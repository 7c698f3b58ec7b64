"""The card of the demo's teacher, a pure function of the `training.json` beside it.

python recipes/demo/teacher_card.py recipes/demo/teacher     writes the card again
"""

import json
import sys
from pathlib import Path

TEMPLATE = """\
---
license: cc-by-4.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo's teacher

A Mistral-architecture language model of {parameters:,} parameters, trained from scratch.
It exists so that conversion and finetuning can be tried and tested on a really trained Transformer without a download.
It imitates the style of its texts (novels of 1840-1920, Microsoft's documentation, Python's PEPs) and knows
nothing: use it for nothing else.

{about}

## Measured on the validation text

The first {windows} windows of 2,048 tokens of the validation text (each document with BOS and EOS, in file order, no
overlap), with the weights as shipped in bf16 and fp32 arithmetic.

{measured}

Far repeats are the positions whose bigram (input, target) occurred earlier in the window, last time more than 128
positions ago, with a target id above 300: {far_repeat_share:.2%} of all.

The texts, their authors and their licences are stated in `../data/README.md`. The weights carry the licence of the
texts: CC-BY-4.0 with attribution.

## Samples

Temperature 0.7, top-p 0.9, seed 0 for the first and one more for each next. Prompts: {prompts}.

{samples}

## The command

    {command}

{schedule}This card is generated from `training.json`.
"""


def table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def card(record: dict) -> str:
    """Markdown of the model card; every figure in it is read from the record."""
    model, validation, training, arguments = (record[k] for k in ("model", "validation", "training", "arguments"))
    about = [
        ("layers, width, feed-forward width", f"{model['layers']}, {model['hidden']}, {model['intermediate']}"),
        ("query heads, key/value heads, head size", f"{model['heads']}, {model['kv_heads']}, {model['head_dim']}"),
        ("vocabulary", f"{model['vocabulary']:,}, byte-level BPE of the same texts; input and output embeddings tied"),
        ("texts", f"{record['train_documents']:,} documents, {record['train_tokens']:,} tokens"),
        ("training", f"{training['tokens']:,} tokens ({training['epochs']:.1f} epochs), {training['steps']:,} steps"),
        ("step", f"{arguments['batch']} sequences of {arguments['length']:,} tokens, crossing document boundaries"),
        ("optimiser", f"AdamW, peak learning rate {arguments['lr']}, weight decay {arguments['weight_decay']}"),
        ("schedule", f"{arguments['warmup']} steps of linear warm-up, then linear to zero; bf16 autocast"),
        ("time", f"{training['seconds']:.0f} s of training steps on one {record['machine']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    measured = [
        ("loss, nats per token", f"**{validation['loss']:.4f}**"),
        ("far-repeat loss, nats per token", f"**{validation['far_repeat_loss']:.4f}**"),
        ("bits per byte", f"{validation['bits_per_byte']:.4f}"),
        ("bytes per token", f"{validation['bytes_per_token']:.3f}"),
    ]
    return TEMPLATE.format(
        parameters=model["parameters"],
        about=table(about),
        windows=validation["windows"],
        measured=table(measured),
        far_repeat_share=validation["far_repeat_share"],
        prompts=", ".join(f"`{json.dumps(prompt)}`" for prompt in record["prompts"]),
        samples="\n\n---\n\n".join("    " + text.replace("\n", "\n    ") for text in record["samples"]),
        command=record["command"],
        schedule=f"`--steps {training['steps']}` in place of `--minutes` gives the same schedule on any machine.\n"
        if arguments["minutes"]
        else "",
    )


if __name__ == "__main__":
    teacher = Path(sys.argv[1])
    record = json.loads((teacher / "training.json").read_text(encoding="utf-8"))
    (teacher / "README.md").write_text(card(record), encoding="utf-8")
