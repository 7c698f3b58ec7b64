"""The learning rate over a stage, as a factor of its peak."""

import math
from collections.abc import Callable

from t2r.recipe import Stage


def schedule(stage: Stage) -> Callable[[int], float]:
    """The factor at each step (0 = the first): linear warm-up, then by `stage.schedule` down to `min_lr_ratio` at the
    last step. `constant` stays at 1; `constant-with-decay` falls linearly over the last `decay` of the steps."""
    steps, warmup, low = stage.steps, stage.warmup_steps, stage.min_lr_ratio
    kind, decay = stage.schedule, max(1, round(stage.decay * stage.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if kind == "constant":
            return 1.0
        begin = max(warmup, steps - decay) if kind == "constant-with-decay" else warmup
        done = min(max((step - begin + 1) / max(1, steps - begin), 0.0), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
        return low + (1 - low) * left

    return factor
