"""Options that several verbs share."""

import math
from pathlib import Path
from typing import Any

import click

dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="auto keeps the stored one.",
)
device = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto is the GPU when there is one."
)


class Names(click.ParamType):
    """Names with commas between them."""

    name = "a,b"

    def __init__(self, *known: str) -> None:
        self.known = known  # none: any name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        found = tuple(part.strip() for part in parts if part.strip())
        for part in found:
            if self.known and part not in self.known:
                self.fail(f"{part!r} is none of {', '.join(self.known)}", param, ctx)
        return found


class Lengths(click.ParamType):
    """Numbers of tokens with commas between them; K stands for 1024."""

    name = "n,m"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        lengths = []
        for part in (part.strip() for part in value.split(",") if part.strip()):
            number, factor = (part[:-1], 1024) if part[-1] in "kK" else (part, 1)
            if not number.isdecimal() or int(number) == 0:
                self.fail(f"{part!r} is no length; write numbers of tokens such as 512,2K,32K", param, ctx)
            lengths.append(int(number) * factor)
        return tuple(lengths)


class Finite(click.FloatRange):
    """A finite number of a range: click's own lets nan through, which is neither below nor above anything."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def make_folder(path: Path) -> None:
    """Make the folder of --output before the work whose results it is for.

    Raises:
        InputError: it is a file, or cannot be made.
    """
    from t2r.errors import InputError

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be made: {error.strerror}") from error
