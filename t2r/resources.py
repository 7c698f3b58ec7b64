"""Where things that ship with t2r lie, in a checkout and in an installed wheel alike."""

from pathlib import Path

from t2r.errors import InputError

PREFIX = "shipped:"
_PACKAGE = Path(__file__).resolve().parent


def recipes_root() -> Path:
    """The folder of the shipped recipes and of the embedded teacher."""
    return _root("recipes", checkout=_PACKAGE.parent / "recipes")


def tasks_root() -> Path:
    """The folder of our own lm-eval task definitions."""
    return _root("tasks", checkout=_PACKAGE.parent / "evals" / "tasks")


def benchmarks_root() -> Path:
    """The folder of the kernels' benchmarks."""
    return _root("benchmarks", checkout=_PACKAGE.parent / "kernels" / "benchmarks")


def resolve(text: str) -> str:
    """A path or Hub id as the user wrote it, with ``shipped:NAME`` replaced by the file or folder that ships with t2r.

    Raises:
        InputError: nothing of that name ships with t2r, or the name leaves the folder.
    """
    if not text.startswith(PREFIX):
        return text
    root = recipes_root()
    path = (root / text.removeprefix(PREFIX)).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise InputError(f"{text}: no such file or folder ships with t2r (looked in {root})")
    return str(path)


def _root(name: str, *, checkout: Path) -> Path:
    installed = _PACKAGE / "_shipped" / name
    return installed if installed.is_dir() else checkout
