"""The command line. One file per verb, imported only when that verb runs, so that `--help` answers at once."""

import difflib
import errno
import importlib
import os
import signal
import sys
from typing import NoReturn

import click

from t2r import __version__

# The help line stands here and not only in the verb's file: listing the verbs must not import them.
VERBS = {
    "convert": "Turn a pretrained Transformer into a recurrent student.",
    "select-layers": "Choose by measurement which layers stay softmax, and place slots.",
    "finetune": "Train a converted student by the stages of a recipe.",
    "run": "Convert, finetune, evaluate and report, from one recipe.",
    "eval": "Measure a model, beside its teacher.",
    "report": "Render or compare stored results; runs no model.",
    "generate": "Continue a prompt with constant memory.",
    "bench": "Time kernels, decoding and training on this machine.",
    "recipes": "List, show, copy and validate recipes.",
    "info": "Show a model's mixers, parameters and state size.",
    "export": "Write a student in another format.",
}

# What storage may answer at any time: told in one line, as nothing of ours is wrong.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(f"t2r.cli.{name.replace('-', '_')}").command if name in VERBS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; verbs are {', '.join(VERBS)}"
            raise click.UsageError(f"no such verb {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: t2r run demo",
)
@click.version_option(__version__, prog_name="t2r")
def cli() -> None:
    """Turn a pretrained Transformer into a recurrent model, finetune it back to strength, and measure what was kept."""


def main() -> NoReturn:
    """Entry point: 0 done, 1 the work failed, 2 wrong usage or bad input (one line), 130 on Ctrl-C."""
    # A closed pipe (`t2r info MODEL | head`) ends us as it ends any Unix program.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # OpenMP's threads wait for each other by spinning, for so long that on a busy machine a training step takes ten
    # times its time. Read once, when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        result = cli.main(prog_name="t2r", standalone_mode=False)
    except click.UsageError as error:
        _complain(error.format_message())
        sys.exit(2)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        _complain(error.format_message())
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        _complain(str(error))
        sys.exit(1)
    except ValueError as error:
        # t2r.errors.InputError and its like in t2r_evals carry an exit code; any other ValueError is our defect.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        _complain(str(error))
        sys.exit(code)
    sys.exit(result if isinstance(result, int) else 0)


def command_line() -> list[str]:
    """The command that this process carries out, for records and cards."""
    return ["t2r", *sys.argv[1:]]


def _complain(message: str) -> None:
    click.echo(f"Error: {message}", err=True)
