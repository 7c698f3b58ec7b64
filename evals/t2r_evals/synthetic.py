"""Look-up in made-up text, by length and by depth: what a model with a fixed state finds hardest.

Four tasks. `phonebook`: lines of a name and a number, one is asked for. `key_value`: the same with bare numbers.
`needle`: one sentence worth keeping among many that are not. `copy`: lines of names, then the same lines again. The
answer is scored by teacher forcing: right when every answer token is the likeliest (for `copy`, the share of tokens
that are), and its loss in nats per answer token, which still tells models apart when none is ever right.

Items depend on the seed and the tokenizer alone, so that models with the same tokenizer are paired item by item.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from t2r_evals.compare import standard_error
from t2r_evals.errors import InputError
from t2r_evals.schema import RecallPoint, TaskMetric, TaskResult

VERSION = "1"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

_FIRST = "Anna Boris Clara David Emma Frank Grace Henry Irene James Karen Louis Maria Norman Olga Peter Rosa"
_LAST = "Archer Baker Carter Dyer Fisher Gardner Hunter Mason Miller Porter Potter Smith Taylor Turner Walker"
_WHO = "cat dog girl boy farmer sailor doctor teacher soldier woman"
_DID = "walked looked ran spoke turned listened waited went"
_WHERE = "mill river road garden church field house bridge"
_PLACES = "harbour castle market station island valley forest village"


@dataclass(frozen=True)
class Item:
    """A prompt that ends before the answer; `depth` is None where the whole text is asked for."""

    task: str
    length: int
    depth: float | None
    index: int
    prompt: str
    answer: str


def run_synthetic(
    model: Any, tokenizer: Any, *, lengths: Sequence[int], items: int, batch_size: int, seed: int = 0
) -> tuple[dict[str, TaskResult], list[RecallPoint], list[dict[str, Any]]]:
    """All four tasks at `lengths` (tokens, answer included), `items` per length and depth.

    Returns:
        Results by task, points by length and depth, and rows per item as lm-eval tasks have them.

    Raises:
        InputError: a length in which a task has no room.
    """
    start = time.perf_counter()
    made = [item for length in lengths for item in make_items(tokenizer, length, items, seed)]
    scored = _score(model, tokenizer, made, batch_size)
    seconds = time.perf_counter() - start
    results: dict[str, TaskResult] = {}
    points: list[RecallPoint] = []
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        mine = [(item, right, loss) for item, (right, loss) in zip(made, scored, strict=True) if item.task == task]
        count = len(mine)
        accuracy = np.array([right for _, right, _ in mine])
        results[task] = TaskResult(
            metrics={
                "acc": TaskMetric(value=accuracy.mean(), stderr=standard_error(accuracy) if count > 1 else None),
                "answer_loss": TaskMetric(value=sum(loss for _, _, loss in mine) / count, higher_is_better=False),
            },
            primary="acc",
            chance=0.0,
            version=VERSION,
            shots=0,
            documents=count,
            limit=None,
            max_length=max(lengths),
            truncated=0,
            seconds=seconds / len(TASKS),
        )
        for length, depth in dict.fromkeys((item.length, item.depth) for item, _, _ in mine):
            cell = [(right, loss) for item, right, loss in mine if (item.length, item.depth) == (length, depth)]
            points.append(
                RecallPoint(
                    task=task,
                    length=length,
                    depth=depth if depth is not None else 0.5,
                    accuracy=sum(right for right, _ in cell) / len(cell),
                    loss=sum(loss for _, loss in cell) / len(cell),
                    documents=len(cell),
                )
            )
        for item, right, loss in mine:
            rows += [_row(item, "acc", right), _row(item, "answer_loss", loss)]
    return results, points, rows


def make_items(tokenizer: Any, length: int, items: int, seed: int) -> list[Item]:
    """The items of every task at one length, the same for the same tokenizer and seed."""
    made = []
    for task, make in TASKS.items():
        for depth in (None,) if task == "copy" else DEPTHS:
            for index in range(items):
                generator = random.Random(f"{seed} {task} {length} {depth} {index}")
                prompt, answer = make(tokenizer, length, depth if depth is not None else 0.5, generator)
                made.append(Item(task, length, depth, index, prompt, answer))
    return made


def _look_up(
    tokenizer: Any,
    length: int,
    depth: float,
    lines: Callable[[int], list[str]],
    query: Callable[[str], tuple[str, str]],
) -> tuple[str, str]:
    """As many lines as fit into `length` tokens with the question; the line at `depth` is asked for."""

    def build(count: int) -> tuple[str, str]:
        text = lines(count)
        question, answer = query(text[round(depth * (count - 1))])
        return "\n".join([*text, question]), answer

    count = _most(tokenizer, length, lambda n: "".join(build(n)))
    return build(count)


def _most(tokenizer: Any, length: int, text: Callable[[int], str]) -> int:
    """The largest count whose text fits into `length` tokens, BOS included."""

    def fits(count: int) -> bool:
        return len(tokenizer(text(count), add_special_tokens=False)["input_ids"]) + 1 <= length

    if not fits(2):
        raise InputError(f"synthetic: {length} tokens are too few for a look-up; take a longer length")
    low, high = 2, 4
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _number(generator: random.Random) -> str:
    return f"{generator.randrange(10**4):04d}"


def _pick(generator: random.Random, words: str) -> str:
    return generator.choice(words.split())


def _name(generator: random.Random) -> str:
    """First name, two initials, last name: enough of them for any length."""
    initials = "".join(generator.choice("ABCDEFGHIJKLMNOPRSTUVW") for _ in range(2))
    return f"{_pick(generator, _FIRST)} {initials} {_pick(generator, _LAST)}"


def _growing(make: Callable[[set[str]], str]) -> Callable[[int], list[str]]:
    """Lines that stay the same when more are asked for."""
    kept: list[str] = []
    used: set[str] = set()

    def lines(count: int) -> list[str]:
        while len(kept) < count:
            kept.append(make(used))
        return kept[:count]

    return lines


def _phonebook(tokenizer: Any, length: int, depth: float, generator: random.Random) -> tuple[str, str]:
    def line(used: set[str]) -> str:
        while (name := _name(generator)) in used:
            pass
        used.add(name)
        return f"{name}: {_number(generator)}"

    def query(line: str) -> tuple[str, str]:
        name, number = line.split(":")
        return f"{name}:", number

    return _look_up(tokenizer, length, depth, _growing(line), query)


def _key_value(tokenizer: Any, length: int, depth: float, generator: random.Random) -> tuple[str, str]:
    def line(used: set[str]) -> str:
        while (key := f"{generator.randrange(10**5):05d}") in used:
            pass
        used.add(key)
        return f"key {key} = {_number(generator)}"

    def query(line: str) -> tuple[str, str]:
        key, value = line.split(" =")
        return f"{key} =", value

    return _look_up(tokenizer, length, depth, _growing(line), query)


def _needle(tokenizer: Any, length: int, depth: float, generator: random.Random) -> tuple[str, str]:
    question = f"The code word of the {_pick(generator, _PLACES)} is"
    answer = f" {_number(generator)}"
    hay = _growing(
        lambda _: f"The {_pick(generator, _WHO)} {_pick(generator, _DID)} to the {_pick(generator, _WHERE)}."
    )

    def build(count: int) -> str:
        sentences = list(hay(count))
        sentences.insert(round(depth * count), f"{question}{answer}.")
        return " ".join([*sentences, question])

    return build(_most(tokenizer, length, lambda n: build(n) + answer)), answer


def _copy(tokenizer: Any, length: int, depth: float, generator: random.Random) -> tuple[str, str]:
    lines = _growing(lambda _: _name(generator))

    def build(count: int) -> tuple[str, str]:
        listed = "\n".join(lines(count))
        return f"{listed}\n\n", listed

    return build(_most(tokenizer, length, lambda n: "".join(build(n))))


TASKS: dict[str, Callable[[Any, int, float, random.Random], tuple[str, str]]] = {
    "phonebook": _phonebook,
    "key_value": _key_value,
    "needle": _needle,
    "copy": _copy,
}


@torch.inference_mode()
def _score(model: Any, tokenizer: Any, items: Sequence[Item], batch_size: int) -> list[tuple[float, float]]:
    """(right, loss per answer token) of each item: longest first, padded on the right, which no causal model sees."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = []
    for index, item in enumerate(items):
        prompt = bos + tokenizer(item.prompt, add_special_tokens=False)["input_ids"]
        whole = bos + tokenizer(item.prompt + item.answer, add_special_tokens=False)["input_ids"]
        encoded.append((index, whole, len(whole) - max(len(whole) - len(prompt), 1)))
    encoded.sort(key=lambda entry: -len(entry[1]))
    scored: list[tuple[float, float]] = [(0.0, 0.0)] * len(items)
    progress = tqdm(total=len(items), desc="look-up", unit="item", leave=False, disable=None)
    for first in range(0, len(encoded), batch_size):
        batch = encoded[first : first + batch_size]
        width = len(batch[0][1])
        ids = torch.tensor([whole + [0] * (width - len(whole)) for _, whole, _ in batch], device=model.device)
        begin = min(start for _, _, start in batch) - 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=width - begin).logits
        for row, (index, whole, start) in enumerate(batch):
            answer = torch.tensor(whole[start:], device=logits.device)
            log_p = torch.log_softmax(logits[row, start - 1 - begin : len(whole) - 1 - begin].float(), dim=-1)
            hits = (log_p.argmax(-1) == answer).float()
            right = hits.mean() if items[index].task == "copy" else hits.min()
            scored[index] = (float(right), float(-log_p.gather(-1, answer[:, None]).mean()))
        progress.update(len(batch))
    progress.close()
    return scored


def _row(item: Item, metric: str, value: float) -> dict[str, Any]:
    depth = "all" if item.depth is None else f"{item.depth:g}"
    return {
        "task": item.task,
        "document": f"{item.task}/{item.length}/{depth}/{item.index}",
        "doc_hash": hashlib.sha256((item.prompt + item.answer).encode()).hexdigest(),
        "metric": metric,
        "value": value,
        "prompt": item.prompt[-600:],
        "target": item.answer[:300],
        "response": "",
    }
