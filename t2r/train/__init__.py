"""Training of a converted student: align, distill, finetune."""

from t2r.train.arguments import processes
from t2r.train.run import finetune, is_finished
from t2r.train.trainer import NonFiniteError

__all__ = ["NonFiniteError", "finetune", "is_finished", "processes"]
