"""The command line under FSDP2 on CPU processes: `torchrun fsdp_on_cpu.py finetune ...`.

accelerate wires FSDP to accelerators alone, while torch shards over gloo as well; so these processes are called GPUs.
"""

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from t2r.cli import main
from t2r.train.trainer import StageTrainer

_init = PartialState.__init__
_create_scheduler = StageTrainer.create_scheduler


def _call_it_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def _tell(self: Any, *args: Any, **kwargs: Any) -> Any:
    print("parameters:", {type(p).__name__ for p in self.model.parameters()}, flush=True)
    return _create_scheduler(self, *args, **kwargs)


PartialState.__init__ = _call_it_gpus  # type: ignore[method-assign]
StageTrainer.create_scheduler = _tell  # type: ignore[method-assign]
main()
