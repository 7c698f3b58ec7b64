"""Load a teacher or a student and its tokenizer by path or Hub id."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from t2r.errors import InputError
from t2r.hub import download, is_hub_id

INDEX = "model.safetensors.index.json"
# Weights, configuration and whatever kind of tokenizer.
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.model.v3", "*.jinja")


def load(path: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """A language model in evaluation mode and its tokenizer.

    Args:
        path: a folder, or a Hub id such as "org/name". Code that comes with a model is never run.
        dtype: also by its name; "auto" keeps the stored one.
        device: "auto" is the GPU when there is one.

    Raises:
        InputError: as `locate`, a folder without a whole model, an index that leaves it, or a device that is not here.
    """
    source, folder = str(path), locate(path)
    _check_index(folder)
    target = pick_device(device)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # lines that overwrite each other are for terminals
    with _told_in_one_line(source):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            # straight to the GPU: on the way there the host's memory need not hold the model
            device_map={"": target} if target.startswith("cuda") and torch.cuda.is_available() else None,
        )
        model, told = loaded
    tokenizer = load_tokenizer(folder)
    if missing := sorted(told["missing_keys"]):
        # transformers would go on with random numbers in their place
        raise InputError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
    try:
        return model.to(target).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: {str(error).splitlines()[0]}") from error


def pick_device(name: str) -> str:
    """The device of that name; for "auto" a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model by path or Hub id.

    Raises:
        InputError: as `locate`, or no tokenizer there.
    """
    with _told_in_one_line(str(path)):
        return AutoTokenizer.from_pretrained(locate(path), trust_remote_code=False)


def _check_index(folder: Path) -> None:
    """transformers would follow an index out of the folder."""
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        names = sorted(map(os.fspath, json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{index}: no index of a checkpoint") from error
    for name in names:
        check_file_name(folder, name)


def check_file_name(folder: Path, name: str) -> None:
    """
    Raises:
        InputError: `name`, as an index or a caller gives it, is no plain file name in `folder`.
    """
    if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise InputError(f"{folder}: {name!r} leaves the folder; files are named without directories")


@contextmanager
def _told_in_one_line(source: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except KeyError as error:  # a tokenizer's file without one of its parts
        raise InputError(f"{source}: cannot be loaded: {error} is missing") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"{source}: cannot be loaded: {' '.join(str(error).split())}") from error


def locate(path: str | Path) -> Path:
    """The folder of a model by path or Hub id, which is downloaded.

    Raises:
        InputError: no such folder and no Hub id, no config.json in it, or a Hub that does not give it.
    """
    source = str(path)
    if not Path(source).is_dir() and not is_hub_id(source):
        raise InputError(f"{source}: no such folder, and not a Hub id (org/name)")
    folder = Path(source) if Path(source).is_dir() else download(source, _FILES)
    if not (folder / "config.json").is_file():
        raise InputError(f"{source}: not a model (no config.json)")
    return folder
