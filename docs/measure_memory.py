"""Which tokens should a head keep when it cannot keep all? One key/value head of a teacher attends only to what a rule
kept, everything else is the teacher's own; the loss above the teacher's, before any training.

    python docs/measure_memory.py --teacher DIR --train TEXT --validation TEXT [--layer 3 --head 1 --slots 384,256,128]

Every rule keeps the first 4 tokens besides:
  window     the last ones; what a clocked `gsa` starts as
  foreseen   drops what the teacher will attend to least from here on (Belady's oracle)
  attended   keeps what the teacher attends to most from 64 tokens on, in all (an oracle)
  predicted  the same, predicted from the layer's input: ridge regression on training text
  aged       predicted, 1/64 less for every token of age; with more it is the window
  repeated   a token whose key nearly equals one held takes its place, any other the oldest's
  counted    repeated, and a token that took an equal's place counts as `slots` tokens younger
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from t2r.convert.calibrate import calibration_windows
from t2r.model import load
from t2r.model.mixers.base import head_shape
from t2r.recipe.schema import DataSource
from t2r.train.documents import open_source, stream_documents
from t2r_evals.language import far_repeats

SINKS, RECENT, NEVER = 4, 64, 1 << 30
NEAR = 0.33  # root mean square distance of two equal keys, over sqrt(2), as `whitened` has them


@dataclass
class Seen:
    """A head at work on one window: the layer's input x [T, hidden], keys before the positions k [T, D], the attention
    that its queries pay [T, T] together, and `whitened` [D, D], which makes W_k x white for white x."""

    x: Tensor
    k: Tensor
    attention: Tensor
    whitened: Tensor


Rule = Callable[[Seen, int], np.ndarray]  # when each token is dropped, NEVER if it is not


def by_score(score: Callable[[int], np.ndarray], tokens: int, slots: int) -> np.ndarray:
    """Keeps sinks and the last RECENT tokens; of the others the one with the lowest score(t) [T] makes room at t."""
    leaves = np.full(tokens, NEVER)
    held = np.zeros(tokens, dtype=bool)
    for t in range(SINKS + RECENT, tokens):
        held[t - RECENT] = True
        if held.sum() > slots - SINKS - RECENT:
            lowest = int(np.where(held, score(t), np.inf).argmin())
            held[lowest], leaves[lowest] = False, t
    return leaves


def window(seen: Seen, slots: int) -> np.ndarray:
    leaves = np.arange(len(seen.x)) + slots - SINKS
    leaves[:SINKS] = NEVER
    return leaves


def foreseen(seen: Seen, slots: int) -> np.ndarray:
    remaining = seen.attention.flip(0).cumsum(0).flip(0).numpy()
    return by_score(lambda t: remaining[t], len(seen.x), slots)


def attended(seen: Seen, slots: int) -> np.ndarray:
    total = received(seen.attention).numpy()
    return by_score(lambda t: total, len(seen.x), slots)


def predicted(weight: Tensor, age: float) -> Rule:
    def rule(seen: Seen, slots: int) -> np.ndarray:
        score = (features(seen.x) @ weight + age * torch.arange(len(seen.x))).numpy()
        return by_score(lambda t: score, len(seen.x), slots)

    return rule


def repeated(bonus: int) -> Rule:
    """What a head with constant state can do: only keys that are still held are compared."""

    def rule(seen: Seen, slots: int) -> np.ndarray:
        z = seen.k @ seen.whitened
        near = (torch.cdist(z, z) < NEAR * (2 * z.shape[1]) ** 0.5).tril(-1)
        match = torch.where(near.any(0), near.int().argmax(0), NEVER).numpy()  # the first later token that is equal
        leaves = np.full(len(z), NEVER)
        written, matched, token = np.zeros(slots, dtype=int), np.full(slots, NEVER), np.full(slots, -1)
        for t in range(len(z)):
            again = bool((matched == t).any())
            if (slot := t) >= slots:
                order = np.where(matched <= t, written - NEVER, written)
                order[:SINKS] = NEVER
                slot = int(order.argmin())
                leaves[token[slot]] = t
            written[slot], matched[slot], token[slot] = t + bonus * slots * again, match[t], t
        return leaves

    return rule


def received(attention: Tensor) -> Tensor:
    """[T]: the attention that each token gets from queries more than RECENT tokens on."""
    return attention.tril(-RECENT).sum(0)


def features(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


class Head:
    """One key/value head of `model`, watched and, with `leaves`, made to forget."""

    def __init__(self, model: Any, layer: int, head: int) -> None:
        query_heads, heads, self.dim = head_shape(model.config)
        self.model, self.layer = model, layer
        self.of_q = slice(head * query_heads // heads, (head + 1) * query_heads // heads)
        self.of_k, self.rows = head, slice(head * self.dim, (head + 1) * self.dim)
        weight = model.model.layers[layer].self_attn.k_proj.weight[self.rows]
        values, vectors = torch.linalg.eigh(weight @ weight.T)
        self.whitened = vectors / values.clamp(min=values[-1] * 1e-5).sqrt()
        self.leaves: np.ndarray | None = None
        self.attention = torch.empty(0)
        AttentionInterface.register("measured", self._attend)
        model.set_attn_implementation("measured")

    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=kwargs["scaling"], enable_gqa=True)
        if module.layer_idx == self.layer:
            t = torch.arange(q.shape[2])
            allowed = t[:, None] >= t
            if self.leaves is not None:
                allowed &= t[:, None] < torch.from_numpy(self.leaves)
            scores = kwargs["scaling"] * q[0, self.of_q] @ k[0, self.of_k].T
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            self.attention = weights.sum(0)
            o[0, self.of_q] = weights @ v[0, self.of_k]
        return o.transpose(1, 2), None

    @contextmanager
    def starting_at(self, caught: dict[str, Any]) -> Iterator[None]:
        """Catch what the layer is called with."""

        def catch(module: Any, args: Any, kwargs: Any) -> None:
            caught.update(hidden=args[0], kwargs=kwargs)

        handle = self.model.model.layers[self.layer].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def losses(self, hidden: Tensor, kwargs: dict[str, Any], targets: Tensor) -> Tensor:
        """[T], from the layer on."""
        for layer in self.model.model.layers[self.layer :]:
            hidden = layer(hidden, **kwargs)
        return F.cross_entropy(self.model.lm_head(self.model.model.norm(hidden))[0], targets, reduction="none")

    def watch(self, ids: Tensor) -> tuple[Seen, dict[str, Any]]:
        """The teacher on ids [T + 1]."""
        caught: dict[str, Any] = {}
        self.leaves = None
        with self.starting_at(caught):
            self.model.model(input_ids=ids[None, :-1], use_cache=False)
        layer = self.model.model.layers[self.layer]
        x = layer.input_layernorm(caught["hidden"])[0]
        return Seen(x, layer.self_attn.k_proj(x)[:, self.rows], self.attention, self.whitened), caught


def fit(head: Head, windows: Tensor) -> Tensor:
    """Weights of `predicted`: ridge regression of the logarithm of the mean attention that a token gets."""
    rows, values = [], []
    for ids in windows:
        seen, _ = head.watch(ids)
        queries = len(seen.x) - RECENT - torch.arange(len(seen.x))
        known = queries >= 256
        rows.append(features(seen.x)[known].double())
        values.append((received(seen.attention) / queries.clamp(min=1) + 1e-6).log()[known].double())
    x, y = torch.cat(rows), torch.cat(values)
    square = x.T @ x
    square += 1e-3 * square.diagonal().mean() * torch.eye(len(square))
    return torch.linalg.solve(square, x.T @ y).float()


def text_windows(source: str, tokenizer: Any, windows: int, window_tokens: int, every: int = 1) -> Tensor:
    """Ids [N, T + 1]; each `every`th of the first windows."""
    documents = stream_documents(open_source(DataSource(source=[source])))
    return calibration_windows(documents, tokenizer, windows=windows * every, window=window_tokens)[every - 1 :: every]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("teacher", "train", "validation"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--head", type=int, default=1)
    parser.add_argument("--slots", default="384,256,128")
    parser.add_argument("--windows", type=int, default=24, help="every second one of the validation text")
    parser.add_argument("--window", type=int, default=2048, help="tokens")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model, tokenizer = load(options.teacher, dtype="float32", device="cpu")
    head = Head(model, options.layer, options.head)
    weight = fit(head, text_windows(options.train, tokenizer, 24, options.window, every=20))
    rules: dict[str, Rule] = {"window": window, "foreseen": foreseen, "attended": attended}
    rules |= {"predicted": predicted(weight, 0.0), "aged": predicted(weight, 1 / 64)}
    rules |= {"repeated": repeated(0), "counted": repeated(1)}
    cases = list(itertools.product([int(n) for n in options.slots.split(",")], rules))
    excess: dict[tuple[int, str], list[Tensor]] = {case: [] for case in cases}
    far: list[Tensor] = []
    for ids in text_windows(options.validation, tokenizer, options.windows, options.window, every=2):
        far.append(torch.from_numpy(far_repeats(ids[:-1].numpy(), ids[1:].numpy(), gap=128, min_id=300)))
        seen, start = head.watch(ids)
        teacher = head.losses(start["hidden"], start["kwargs"], ids[1:])
        for slots, rule in cases:
            head.leaves = rules[rule](seen, slots)
            excess[slots, rule].append(head.losses(start["hidden"], start["kwargs"], ids[1:]) - teacher)
    where = torch.cat(far)
    lines = [f"| slots | {' | '.join(rules)} |", f"|---:|{'---:|' * len(rules)}"]
    for slots in dict.fromkeys(slots for slots, _ in cases):
        found = [torch.cat(excess[slots, rule]) for rule in rules]
        cells = [f"{x.mean():+.3f}, {x[where].mean():+.3f}" for x in found]
        lines.append(f"| {slots} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
