"""What software made a result."""

import importlib.metadata
import platform

from t2r import __version__

PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "peft", "datasets")


def versions() -> dict[str, str]:
    """Versions of what decides the bytes of a conversion and the numbers of a training run."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"t2r": __version__, "python": platform.python_version(), **found}
