"""`t2r generate`: continue a prompt with constant memory."""

import sys

import click

from t2r.cli import options


@click.command(
    "generate", epilog="Example: t2r generate mistral-7b-gsa --prompt 'Once upon a time' --max-new-tokens 200"
)
@click.argument("model")
@click.option("--prompt", default="-", show_default=True, help="The text to continue; - reads standard input.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Stop after these.")
@click.option(
    "--temperature", type=options.Finite(0), default=0.8, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-p", type=options.Finite(0, 1, min_open=True), default=0.95, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 samples from all tokens.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the sampling.")
@options.device
@options.dtype
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    device: str,
    dtype: str,
) -> None:
    """Print the continuation of a prompt as it comes, from MODEL, a folder or Hub id of a student or a teacher.

    A student's memory does not grow with the text. Speed and state size are told on standard error at the end.
    """
    from t2r.errors import InputError
    from t2r.generate import Statistics, generate
    from t2r.model import load
    from t2r.resources import resolve

    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompt -: standard input is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    loaded, tokenizer = load(resolve(model), dtype=dtype, device=device)
    told = Statistics()
    pieces = generate(
        loaded,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        statistics=told,
    )
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    decoded = told.new_tokens - 1  # the first came with the prompt
    speed = f"{decoded / told.decode_seconds:,.1f} tokens/s" if decoded else "one token"
    click.echo(
        f"prompt: {told.prompt_tokens:,} tokens in {told.prefill_seconds:.2f} s; new: {told.new_tokens:,} tokens, "
        f"{speed}; state: {told.state_bytes:,} bytes",
        err=True,
    )
