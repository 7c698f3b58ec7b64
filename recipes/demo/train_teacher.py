"""Train the demo's teacher: a small Mistral-architecture language model and its tokenizer, from plain text.

    python recipes/demo/train_teacher.py --data DIR

writes tokenizer, weights, `training.json` and the model card into recipes/demo/teacher. DIR holds `train.txt.xz` and
`val.txt`: UTF-8 documents separated by a line with one NUL character. Four minutes on one H200; on a CPU only good for
trying the script (`--documents 400 --steps 10 --batch 2 --length 128`).
"""

import argparse
import json
import lzma
import math
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from teacher_card import card
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2 as in Mistral; the end of a document also pads
WINDOW, WINDOWS = 2048, 48  # validation protocol: inputs per window, number of windows
PROMPTS = (
    "She opened the door, and",
    "# CreateWindow function\n\nCreates a",
    "Abstract\n========\n\nThis PEP proposes",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt.xz and val.txt")
    parser.add_argument("--output", type=Path, default=HERE / "teacher", help="new folder")
    parser.add_argument("--documents", type=int, help="use only the first N training documents (to try the script)")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="training sequence length, in tokens")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--steps", type=int, default=12_629)
    parser.add_argument("--minutes", type=float, help="choose --steps so that the steps alone take this long")
    parser.add_argument("--warmup", type=int, default=500, help="steps of linear warm-up; then linear decay to zero")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for needed in (arguments.data / "train.txt.xz", arguments.data / "val.txt"):
        if not needed.is_file():
            parser.error(f"--data: {needed} is missing")
    if arguments.output.exists():
        parser.error(f"--output: {arguments.output} exists; move it away first")
    return arguments


def read_documents(path: Path) -> list[str]:
    raw = path.read_bytes()
    text = lzma.decompress(raw) if path.suffix == ".xz" else raw
    return text.decode("utf-8").split("\n\0\n")


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without normalisation: any text decodes to itself. Digits stand alone."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[UNK, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[np.ndarray]:
    """Token ids of each document with its BOS and EOS; a thousand at a time bounds the memory of the encodings."""
    encoded = []
    for first in range(0, len(documents), 1000):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents[first : first + 1000]):
            encoded.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32))
    return encoded


def far_repeats(inputs: np.ndarray, targets: np.ndarray, gap: int = 128, first_id: int = 300) -> np.ndarray:
    """Mask [T]: the bigram (input, target) last occurred more than `gap` positions ago, and target > `first_id`."""
    last: dict[tuple[int, int], int] = {}
    far = np.zeros(len(inputs), dtype=bool)
    for t, bigram in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        far[t] = bigram in last and t - last[bigram] > gap and bigram[1] > first_id
        last[bigram] = t
    return far


@torch.no_grad()
def evaluate(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, windows: int = WINDOWS):
    """Mean next-token loss in nats over the first windows of 2,048 inputs of a token stream, with the far repeats' own.

    Stride 2,048, so each target is predicted once; returns a dict of plain numbers.
    """
    losses, far = [], []
    for w in range(windows):
        window = torch.from_numpy(ids[w * WINDOW : (w + 1) * WINDOW + 1]).long().to(model.device)
        logits = model(window[None, :-1], use_cache=False).logits[0].float()
        losses.append(F.cross_entropy(logits, window[1:], reduction="none").double().cpu())
        far.append(torch.from_numpy(far_repeats(window[:-1].cpu().numpy(), window[1:].cpu().numpy())))
    loss, is_far = torch.stack(losses), torch.stack(far)
    pieces = tokenizer.convert_ids_to_tokens(ids[1 : windows * WINDOW + 1].tolist())
    n_bytes = sum(len(piece) for piece in pieces if piece not in (UNK, BOS, EOS))  # one character per byte in a piece
    return {
        "loss": loss.mean().item(),
        "far_repeat_loss": loss[is_far].mean().item(),
        "far_repeat_share": is_far.double().mean().item(),
        "bits_per_byte": loss.sum().item() / math.log(2) / n_bytes,
        "bytes_per_token": n_bytes / loss.numel(),
        "windows": windows,
        "loss_by_window": [round(x, 5) for x in loss.mean(1).tolist()],
    }


def build_model(arguments: argparse.Namespace) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = MistralForCausalLM(config)
    with torch.no_grad():  # GPT-2's start: what is added to the residual stream shrinks with depth
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight /= math.sqrt(2 * arguments.layers)
    return model


def batches(tokens: torch.Tensor, batch: int, length: int, seed: int):
    """Endless [batch, length + 1] windows of the stream; each epoch has a new random offset and order."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(length + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        starts = torch.arange(offset, len(tokens) - length, length)
        order = starts[torch.randperm(len(starts), generator=generator)].to(tokens.device)
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            yield tokens[chosen[:, None] + span]


def train(model: MistralForCausalLM, tokens: torch.Tensor, arguments: argparse.Namespace) -> dict:
    """AdamW under bf16 autocast; returns steps, tokens, seconds and the loss curve."""
    device = tokens.device
    on_gpu = device.type == "cuda"

    def next_token_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), targets.flatten())

    if on_gpu:  # layer by layer: compiled as a whole, transformers builds a mask that shuts flash attention out
        for part in (*model.model.layers, model.model.norm):
            part.compile()
        next_token_loss = torch.compile(next_token_loss)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": arguments.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=on_gpu,
    )
    data = batches(tokens, arguments.batch, arguments.length, arguments.seed)
    steps, curve, since = arguments.steps, [], time.perf_counter()
    started = since
    calibrate = (20, 120) if arguments.minutes else ()  # within the warm-up, which does not depend on `steps`
    for step in range(1, 10**9):
        rate = arguments.lr * min(step / arguments.warmup, (steps - step) / max(1, steps - arguments.warmup))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 0.0)
        batch = next(data)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
            loss = next_token_loss(hidden, batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in calibrate:
            if on_gpu:
                torch.cuda.synchronize()
            if step == calibrate[0]:
                since = time.perf_counter()
            else:
                per_step = (time.perf_counter() - since) / (calibrate[1] - calibrate[0])
                steps = max(step, int(arguments.minutes * 60 / per_step))
                print(f"{per_step * 1e3:.2f} ms per step: {steps} steps", flush=True)
        if step % max(1, steps // 40) == 0 or step >= steps:
            value = loss.item()
            print(f"step {step}/{steps}  loss {value:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
            if not math.isfinite(value):
                raise SystemExit(f"error: loss is {value} at step {step}; try a smaller --lr")
            curve.append([step, round(value, 4)])
        if step >= steps:
            break
    tokens_seen = steps * arguments.batch * arguments.length
    return {
        "steps": steps,
        "tokens": tokens_seen,
        "epochs": tokens_seen / len(tokens),
        "seconds": time.perf_counter() - started,
        "curve": curve,
    }


@torch.no_grad()
def sample(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    settings = {"max_new_tokens": 90, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    output = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **settings)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def make_teacher(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:.0f} s] {text}", flush=True)

    documents = read_documents(arguments.data / "train.txt.xz")[: arguments.documents]
    say(f"{len(documents):,} documents read")
    tokenizer = train_tokenizer(documents, arguments.vocabulary)
    say("tokenizer trained")
    tokens = torch.from_numpy(np.concatenate(encode(tokenizer, documents))).to(device)
    val = np.concatenate(encode(tokenizer, read_documents(arguments.data / "val.txt")))
    say(f"{len(tokens):,} training tokens, {len(val):,} validation tokens")
    model = build_model(arguments).to(device)
    training = train(model, tokens.long(), arguments)
    say("trained")

    beside = arguments.output.with_name(arguments.output.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shipped = MistralForCausalLM.from_pretrained(beside, dtype=torch.float32).to(device).eval()
    record = {
        "model": {
            "parameters": sum(p.numel() for p in shipped.parameters()),
            "head_dim": shipped.config.head_dim,
            **{name: getattr(arguments, name) for name in ("vocabulary", "hidden", "intermediate", "layers")},
            **{name: getattr(arguments, name) for name in ("heads", "kv_heads")},
        },
        "arguments": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)},
        "train_documents": len(documents),
        "train_tokens": len(tokens),
        "training": training,
        "validation": evaluate(shipped, tokenizer, val),
        "prompts": PROMPTS,
        "samples": [sample(shipped, tokenizer, prompt, seed) for seed, prompt in enumerate(PROMPTS)],
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "command": shlex.join(["python", "recipes/demo/train_teacher.py", *sys.argv[1:]]),
    }
    (beside / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (beside / "README.md").write_text(card(record), encoding="utf-8")
    (beside / "model.safetensors").chmod(0o644)  # safetensors creates it for its owner alone
    beside.rename(arguments.output)
    measured = record["validation"]
    say(f"loss {measured['loss']:.4f}, far repeats {measured['far_repeat_loss']:.4f}; wrote {arguments.output}")


if __name__ == "__main__":
    make_teacher(parse_arguments())
