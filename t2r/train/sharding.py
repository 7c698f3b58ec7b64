"""How FSDP2 shards a student: which modules are units, and in which precision their weights travel."""

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from t2r.model.mixers import Mixer
from t2r.recipe import AlignStage, Stage
from t2r.recipe.schema import Distributed


def shard(plugin: Any, model: Any, stage: Stage, options: Distributed) -> None:
    """Tell accelerate's FSDP plugin how to shard `model` for a stage.

    Each layer is a unit. Align calls the mixers one by one, past their layers: there each mixer is a unit of its own,
    and what is left of a layer, which align does not run, is never gathered.

    The weights are sharded in float32. `gather: fp32` moves them so too, and autocast lowers them as on one device:
    the same results. `gather: bf16` halves the traffic; the mixers' gates and clocks then lose precision in the
    forward pass. Gradients are summed over the processes in float32 either way.
    """
    units = {type(layer).__name__ for layer in model.model.layers}
    if isinstance(stage, AlignStage):
        units |= {type(module).__name__ for module in model.modules() if isinstance(module, Mixer)}
    plugin.transformer_cls_names_to_wrap = sorted(units)
    low = stage.precision == "bf16" and options.gather == "bf16"
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32
    )
