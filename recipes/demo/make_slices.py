"""Cut the demo's training and validation text out of the texts its teacher was trained on.

    python recipes/demo/make_slices.py --data DIR

writes train.parquet, validation.parquet (one column, `text`; one row per document) and their data statement into
recipes/demo/data. DIR is that of train_teacher.py; the teacher's tokenizer counts the tokens.
"""

import argparse
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
from train_teacher import HERE, WINDOW, WINDOWS, encode, read_documents
from transformers import PreTrainedTokenizerFast

STATEMENT = """\
---
license: cc-by-4.0
language: en
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
---

# The demo's texts

| file | documents | bytes of text | tokens of the demo's teacher (BOS and EOS of each document included) |
|---|---|---|---|
{rows}

One column, `text`; one row per document. `train.parquet` is a random draw of documents (seed {seed}) from the
{train_documents:,} its teacher was trained on, leaving out those above {longest:,} characters; `validation.parquet`
holds the first of {val_documents} other documents, in order, as many as the {windows} windows of {window:,} tokens need
that the teacher's card is measured on. Both are written by `make_slices.py`.

## Sources, authors, licences

The teacher's weights and these slices are derived from:

- **ELTeC-eng**, the English collection of the European Literary Text Collection (COST Action CA16204, *Distant Reading
  for European Literary History*), https://github.com/COST-ELTeC/ELTeC-eng: 89 novels, 1840-1920. The texts are in the
  public domain, the edition is under CC-BY-4.0. Changed: cut into pieces of about 20,000 characters.
- **Microsoft's documentation**, by Microsoft Corporation and contributors, CC-BY-4.0:
  https://github.com/MicrosoftDocs/win32, https://github.com/MicrosoftDocs/windows-driver-docs,
  https://github.com/MicrosoftDocs/PowerShell-Docs and https://github.com/MicrosoftDocs/cpp-docs.
  Changed: front matter, links and tags removed.
- **Python Enhancement Proposals**, by their authors, https://github.com/python/peps, in the public domain.

CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/. Whoever passes on the slices or the weights keeps this
attribution. The licensors endorse neither. The novels speak as their time did, with its prejudices.
"""


def take(tokenizer: PreTrainedTokenizerFast, documents: list[str], tokens: int) -> tuple[list[str], int]:
    """The first documents that together have at least `tokens` tokens, and how many they have."""
    taken, total = [], 0
    for document in documents:
        if total >= tokens:
            break
        taken.append(document)
        total += len(encode(tokenizer, [document])[0])
    return taken, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt.xz and val.txt")
    parser.add_argument("--teacher", type=Path, default=HERE / "teacher", help="folder with the tokenizer")
    parser.add_argument("--output", type=Path, default=HERE / "data", help="new folder")
    parser.add_argument("--tokens", type=int, default=620_000, help="size of the training slice")
    parser.add_argument("--longest", type=int, default=40_000, help="longest training document, in characters")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output: {arguments.output} exists; move it away first")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.teacher)
    train, val = read_documents(arguments.data / "train.txt.xz"), read_documents(arguments.data / "val.txt")
    drawn = [document for document in train if len(document) <= arguments.longest]
    random.Random(arguments.seed).shuffle(drawn)
    slices = {
        "train": take(tokenizer, drawn, arguments.tokens),
        "validation": take(tokenizer, val, WINDOWS * WINDOW + 1),
    }
    beside = arguments.output.with_name(arguments.output.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    rows = []
    for name, (documents, tokens) in slices.items():
        table = pyarrow.table({"text": documents})
        pyarrow.parquet.write_table(table, beside / f"{name}.parquet", compression="zstd", compression_level=22)
        n_bytes = sum(len(document.encode()) for document in documents)
        rows.append(f"| `{name}.parquet` | {len(documents):,} | {n_bytes:,} | {tokens:,} |")
    statement = STATEMENT.format(
        rows="\n".join(rows),
        seed=arguments.seed,
        train_documents=len(train),
        val_documents=len(val),
        longest=arguments.longest,
        windows=WINDOWS,
        window=WINDOW,
    )
    (beside / "README.md").write_text(statement, encoding="utf-8")
    beside.rename(arguments.output)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
