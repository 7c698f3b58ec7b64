"""What a conversion loses before any training, measured on text: per layer, and for the whole student."""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2r.convert.swap import Entry, SwappedStudent
from t2r.errors import InputError
from t2r.model import load
from t2r.model.mixers import Mixer
from t2r.model.sequence import SequenceInfo

_BATCH_TOKENS = 8192
_CHUNK_NUMBERS = 1 << 25  # logits held at once, of teacher and student each


class Score(NamedTuple):
    """KL(teacher || student) and next-token cross-entropy of the student, means in nats per token; and the KL on far
    repeats alone (see `far_repeats`), 0 where the text has none."""

    kl: float
    loss: float
    far_kl: float


def calibration_windows(documents: Iterable[str], tokenizer: Any, *, windows: int, window: int) -> Tensor:
    """Ids [N, T + 1]: windows of T inputs and their targets over the documents joined in order, each with its BOS and
    EOS where the tokenizer has them.

    Raises:
        InputError: too little text.
    """
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        ids += before + tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + after
        if len(ids) > windows * window:
            break
    if len(ids) <= windows * window:
        raise InputError(f"calibration text: {len(ids)} tokens, {windows} windows of {window} need one more than that")
    return torch.tensor(ids[: windows * window + 1]).unfold(0, window + 1, window)


def far_repeats(ids: Tensor, *, gap: int = 128) -> Tensor:
    """bool [N, T] of windows ids [N, T + 1]: where input and target occurred as a pair before in the window, the last
    time more than `gap` tokens ago. What comes next can be known there, by who remembers that far."""
    found = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
    for row, window in zip(found, ids.tolist(), strict=True):
        last: dict[tuple[int, int], int] = {}
        for position, pair in enumerate(pairwise(window)):
            row[position] = position - last.get(pair, position) > gap
            last[pair] = position
    return found


class Probe:
    """Measures a teacher with any mixers in its layers, always on the same tokens; what was measured is remembered.

    Args:
        teacher: a host's language model on its device.
        windows: ids [N, T + 1].
        seed: of the mixers' new parameters.
    """

    def __init__(self, teacher: Any, windows: Tensor, *, seed: int = 0) -> None:
        self.teacher = teacher
        self.layers = len(teacher.model.layers)
        self._swapped = SwappedStudent(teacher, seed=seed)
        batch = max(1, _BATCH_TOKENS // (windows.shape[1] - 1))
        far = far_repeats(windows).to(teacher.device)
        self._batches = list(windows.to(teacher.device).split(batch))
        self._far = [part.flatten() for part in far.split(batch)]
        self._far_count = max(1, int(far.sum()))
        self.tokens = windows[:, 1:].numel()
        self.window = windows.shape[1] - 1
        self._known: dict[str, Score] = {}
        with torch.inference_mode():
            self._hidden = [_hidden(teacher, ids) for ids in self._batches]

    @property
    def measured(self) -> int:
        """How many different students were run."""
        return len(self._known)

    @torch.inference_mode()
    def score(self, entries: Sequence[Entry]) -> Score:
        """The student whose layers have these mixers; None keeps the teacher's attention."""
        key = json.dumps(list(entries), sort_keys=True)
        if key not in self._known:
            student = self._swapped.set(entries)
            sums = torch.zeros(3, dtype=torch.float64)
            for ids, far, reference in zip(self._batches, self._far, self._hidden, strict=True):
                hidden = _hidden(student, ids)
                sums += _compare(self.teacher.lm_head.weight, reference, hidden, ids[:, 1:].flatten(), far)
            counts = torch.tensor([self.tokens, self.tokens, self._far_count])
            self._known[key] = Score(*(sums / counts).tolist())
        return self._known[key]

    @torch.inference_mode()
    def output_errors(self, entries: Sequence[Entry]) -> list[float | None]:
        """Per layer, the squared error of the mixer's output over the mean square of the attention's, both on the
        teacher's own input to that layer: 0 is perfect, giving zeros scores 1. None where the attention stays."""
        mixers = [None if entry is None else self._swapped.mixer(i, entry) for i, entry in enumerate(entries)]
        error, size = torch.zeros(2, self.layers, dtype=torch.float64)
        index_of = {layer.self_attn: index for index, layer in enumerate(self.teacher.model.layers)}

        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            index = index_of[module]
            mixer: Mixer | None = mixers[index]
            if mixer is not None:
                hidden = kwargs["hidden_states"]
                info = SequenceInfo.build(hidden.shape[0], hidden.shape[1], hidden.device)
                ours, _ = mixer(hidden, position_embeddings=kwargs["position_embeddings"], attention_mask=info)
                error[index] += (ours.float() - output[0].float()).square().sum().cpu()
                size[index] += output[0].float().square().sum().cpu()

        handles = [attention.register_forward_hook(compare, with_kwargs=True) for attention in index_of]
        try:
            for ids in self._batches:
                _hidden(self.teacher, ids)
        finally:
            for handle in handles:
                handle.remove()
        relative = (error / size).tolist()
        return [None if mixer is None else value for mixer, value in zip(mixers, relative, strict=True)]


def calibrate(
    source: str,
    entries: Sequence[Entry],
    documents: Iterable[str],
    *,
    windows: int = 4,
    window: int = 2048,
    dtype: str | None = "bfloat16",
    seed: int = 0,
) -> dict[str, Any]:
    """The init report of a conversion that need not have been made.

    Args:
        source: folder or Hub id of the teacher, which is loaded whole.
        entries: the mixer of each layer, None where the attention stays.
        documents: text; the first `windows` windows of `window` tokens are read.
        dtype, seed: those of the conversion.

    Raises:
        InputError: too little text, or a source that is no teacher.
    """
    teacher, tokenizer = load(source, dtype=dtype or "auto")
    ids = calibration_windows(documents, tokenizer, windows=windows, window=window)
    return init_report(Probe(teacher, ids, seed=seed), entries)


def init_report(probe: Probe, entries: Sequence[Entry]) -> dict[str, Any]:
    """What a student with these mixers is before training, on this text.

    Returns:
        {"tokens", "teacher_loss", "loss", "kl", "layers"}: losses and KL(teacher || student) in nats per token, and of
        every converted layer {"layer", "mixer", "output_error", "kl_alone"}, the error as in `Probe.output_errors`,
        the KL when this layer alone is converted.
    """
    errors = probe.output_errors(entries)
    whole, teacher = probe.score(entries), probe.score([None] * probe.layers)
    layers = []
    for index, entry in enumerate(entries):
        if entry is not None:
            alone: list[Entry] = [None] * probe.layers
            alone[index] = entry
            row = {"layer": index, "mixer": entry["name"], "output_error": errors[index]}
            layers.append(row | {"kl_alone": probe.score(alone).kl})
    return {"tokens": probe.tokens, "teacher_loss": teacher.loss, "loss": whole.loss, "kl": whole.kl, "layers": layers}


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """The last hidden states [B * T, hidden] at the inputs of ids [B, T + 1]."""
    return model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)


def _compare(head: Tensor, teacher: Tensor, student: Tensor, targets: Tensor, far: Tensor) -> Tensor:
    """Summed KL, cross-entropy and KL where `far`, float64 [3]. The logits are made a chunk of tokens at a time."""
    size = max(1, _CHUNK_NUMBERS // head.shape[0])
    sums = torch.zeros(3, dtype=torch.float64)
    for reference, hidden, target, part in zip(*(x.split(size) for x in (teacher, student, targets, far)), strict=True):
        log_p, log_q = (F.log_softmax((x @ head.T).float(), dim=-1) for x in (reference, hidden))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        loss = F.nll_loss(log_q, target, reduction="sum").double()
        sums += torch.stack([kl.sum(), loss, kl[part].sum()]).cpu()
    return sums
