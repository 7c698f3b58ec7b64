"""Loss on running text: perplexity, bits per byte, loss by position, loss on far repeats.

Protocol: every document becomes BOS + its tokens + EOS, all are concatenated in order and cut into windows of W inputs
with stride W; the first N windows are scored, mean next-token cross-entropy in nats, log-softmax in fp32.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from t2r_evals.errors import InputError
from t2r_evals.schema import LanguageResult, PositionLoss


@dataclass(frozen=True)
class TokenStream:
    """Concatenated documents: token ids [N] and the UTF-8 bytes [N] that each token adds to its document."""

    ids: np.ndarray
    bytes: np.ndarray


def token_stream(tokenizer: Any, documents: Sequence[str], *, tokens: int | None = None) -> TokenStream:
    """BOS + document + EOS, concatenated; BOS or EOS is left out where the tokenizer has none.

    A token's bytes are what it advances in its document's UTF-8 text, so that they add up to the document however the
    tokenizer splits a character; BOS and EOS have none.

    Args:
        tokens: stop after the document that reaches this many tokens; None = all documents.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    sizes: list[int] = []
    for document in documents:
        encoding = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        widths = np.array([0] + [len(character.encode("utf-8", "surrogatepass")) for character in document])
        byte_at = np.cumsum(widths)
        ends = np.array([byte_at[end] for _, end in encoding["offset_mapping"]], dtype=np.int64)
        reached = np.maximum.accumulate(ends) if len(ends) else ends
        ids += bos + encoding["input_ids"] + eos
        sizes += [0] * len(bos) + np.diff(reached, prepend=0).tolist() + [0] * len(eos)
        if tokens is not None and len(ids) >= tokens:
            break
    return TokenStream(np.array(ids, dtype=np.int64), np.array(sizes, dtype=np.int64))


def scored_stream(
    tokenizer: Any, documents: Sequence[str], *, windows: int | None, window: int
) -> tuple[TokenStream, int]:
    """The tokens of the first `windows` windows (None: of all full ones) with the last target, and their number.

    Raises:
        InputError: fewer than `windows` full windows of text, or none at all.
    """
    stream = token_stream(tokenizer, documents, tokens=None if windows is None else windows * window + 1)
    available = (len(stream.ids) - 1) // window
    if available < (windows or 1):
        raise InputError(
            f"documents: {len(stream.ids)} tokens make {max(available, 0)} windows of {window}; "
            f"windows={windows or 1} needs {(windows or 1) * window + 1}"
        )
    count = windows or available
    used = slice(0, count * window + 1)
    return TokenStream(stream.ids[used], stream.bytes[used]), count


def far_repeats(inputs: np.ndarray, targets: np.ndarray, *, gap: int, min_id: int) -> np.ndarray:
    """Positions of one window whose bigram (input, target) occurred before, last time more than `gap` positions ago,
    with a target id above `min_id` (in most tokenizers the ids below are bytes and single characters).

    A model with a short memory cannot read these from its context: their loss measures recall.

    Args:
        inputs, targets: ids [W] of one window.

    Returns:
        bool [W].
    """
    found = np.zeros(len(inputs), dtype=bool)
    last: dict[tuple[int, int], int] = {}
    for position, bigram in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        before = last.get(bigram)
        found[position] = before is not None and position - before > gap and bigram[1] > min_id
        last[bigram] = position
    return found


def measure(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    windows: int | None,
    window: int,
    batch_size: int,
    far_repeat_gap: int = 128,
    far_repeat_min_id: int = 300,
    teacher: Any = None,
) -> LanguageResult:
    """Score `model` on the first `windows` windows of `documents` (None: all full windows).

    Raises:
        InputError: as `scored_stream`.
    """
    start = time.perf_counter()
    stream, count = scored_stream(tokenizer, documents, windows=windows, window=window)
    inputs, targets = stream.ids[:-1].reshape(count, window), stream.ids[1:].reshape(count, window)
    losses, kl, agreement = _score(model, teacher, torch.from_numpy(inputs), torch.from_numpy(targets), batch_size)
    repeats = np.stack(
        [far_repeats(x, y, gap=far_repeat_gap, min_id=far_repeat_min_id) for x, y in zip(inputs, targets, strict=True)]
    )
    loss = float(losses.mean())
    size = int(stream.bytes[1:].sum())
    return LanguageResult(
        windows=count,
        window=window,
        tokens=losses.size,
        bytes=size,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=float(losses.sum()) / math.log(2) / max(size, 1),
        far_repeat_loss=float(losses[repeats].mean()) if repeats.any() else None,
        far_repeat_tokens=int(repeats.sum()),
        far_repeat_gap=far_repeat_gap,
        far_repeat_min_id=far_repeat_min_id,
        loss_by_position=_by_position(losses),
        window_losses=losses.mean(axis=1).tolist(),
        kl_to_teacher=kl,
        top1_agreement=agreement,
        data_sha256=hashlib.sha256(stream.ids.tobytes()).hexdigest(),
        seconds=time.perf_counter() - start,
    )


def position_edges(window: int) -> list[int]:
    """Bucket edges 0, 16, 32, 64, 96, 128, 192, 256, 384, ... up to `window`: what happens around the number of slots
    shows in the early ones, the late ones hold enough tokens to be sharp."""
    edges = [0]
    power = 16
    while power < window:
        edges.append(power)
        if power >= 64 and power * 3 // 2 < window:
            edges.append(power * 3 // 2)
        power *= 2
    return edges + [window]


def _by_position(losses: np.ndarray) -> list[PositionLoss]:
    edges = position_edges(losses.shape[1])
    return [
        PositionLoss(start=a, end=b, loss=float(losses[:, a:b].mean()), tokens=losses[:, a:b].size)
        for a, b in itertools.pairwise(edges)
    ]


@torch.inference_mode()
def _score(
    model: Any, teacher: Any, inputs: torch.Tensor, targets: torch.Tensor, batch_size: int
) -> tuple[np.ndarray, float | None, float | None]:
    """Loss [N, W] in nats (float64); mean KL(teacher || model) and top-1 agreement, None without a teacher."""
    losses, kl, same = [], 0.0, 0
    progress = tqdm(total=len(inputs), desc="windows", unit="window", leave=False, disable=None)
    for first in range(0, len(inputs), batch_size):
        x = inputs[first : first + batch_size].to(model.device)
        logits = model(input_ids=x, use_cache=False).logits
        y = targets[first : first + batch_size].to(logits.device)
        reference = None if teacher is None else teacher(input_ids=x, use_cache=False).logits
        for row in range(len(x)):
            # Row by row: the fp32 copy of a whole batch of logits would be the largest tensor of the evaluation.
            log_p = torch.log_softmax(logits[row].float(), dim=-1)
            losses.append(-log_p.gather(-1, y[row, :, None])[:, 0].double().cpu())
            if reference is not None:
                log_q = torch.log_softmax(reference[row].to(log_p.device).float(), dim=-1)
                kl += float((log_q.exp() * (log_q - log_p)).sum(-1).double().sum())
                same += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        progress.update(len(x))
    progress.close()
    scored = torch.stack(losses).numpy()
    if teacher is None:
        return scored, None, None
    return scored, kl / scored.size, same / scored.size
