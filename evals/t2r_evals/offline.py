"""A folder that stands in for the Hub's data sets: `load_dataset("org/name")` reads `ROOT/org/name`."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2r_evals.errors import InputError


@contextmanager
def offline_data(root: Path | None) -> Iterator[None]:
    """Within the block, data sets load from `root` and nothing is asked of the network; None changes nothing.

    `datasets` resolves a name against the working directory first and caches by the name's last part only, so the
    block runs inside `root` and with a cache of the tree's own. The offline switches are read when `datasets` and
    `huggingface_hub` are imported, which may have happened: both the variables and the read values are set, and put
    back afterwards. Process-wide, so not for threads.

    Raises:
        InputError: `root` is no folder.
    """
    if root is None:
        yield
        return
    root = Path(root).resolve()
    if not root.is_dir():
        raise InputError(f"offline_root: {root} is not a folder")
    import datasets
    import huggingface_hub.constants

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "t2r-offline" / tree_key(root)
    values = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_DATASETS_OFFLINE", True),
        (datasets.config, "HF_DATASETS_CACHE", cache),
    ]
    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    old_values = [(module, name, getattr(module, name)) for module, name, _ in values]
    old_variables = {name: os.environ.get(name) for name in variables}
    old_folder = Path.cwd()
    try:
        for module, name, value in values:
            setattr(module, name, value)
        os.environ.update(variables)
        os.chdir(root)
        yield
    finally:
        os.chdir(old_folder)
        for module, name, value in old_values:
            setattr(module, name, value)
        for name, old in old_variables.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def tree_key(root: Path) -> str:
    """A name for the tree at `root` that changes when a file is added, removed, resized or rewritten."""
    digest = hashlib.sha256(str(root).encode())
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
