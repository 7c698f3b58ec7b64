"""t2r: turn a pretrained Transformer into a recurrent model.

``import t2r`` registers the student classes with transformers, so that ``AutoModelForCausalLM.from_pretrained`` loads
a converted model. The command line does that only when a verb needs a model: ``t2r --help`` must not wait for torch.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"


def _is_own_command_line() -> bool:
    """True while the console script ``t2r``, or ``python -m t2r`` (argv[0] is "-m" until it starts), imports us."""
    return Path(sys.argv[0]).name in ("t2r", "-m") if sys.argv else False


if not _is_own_command_line():
    import t2r.model  # noqa: F401  (registers the student classes)
