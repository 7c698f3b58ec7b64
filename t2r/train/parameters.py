"""Which parameters a stage trains, and in which optimiser group each lies."""

from typing import Any

import torch
from torch import nn

from t2r.errors import InputError
from t2r.model.mixers import Mixer
from t2r.recipe import AlignStage, Stage
from t2r.recipe.stages import Lora
from t2r.train.fused import fuse

# A firm gate has a small slope (sigmoid'(8) = 3e-4), and AdamW's usual eps would drown the gradients behind it.
ADAM_EPS = {"new": 1e-15, "mixer": 1e-8, "rest": 1e-8}


def roles(student: nn.Module) -> dict[int, str]:
    """ "new" or "mixer" by id of each mixer parameter; whatever is missing is "rest"."""
    found: dict[int, str] = {}
    for module in student.modules():
        if isinstance(module, Mixer):
            new = {id(p) for p in module.new_parameters().values()}
            found |= {id(p): "new" if id(p) in new else "mixer" for p in module.parameters()}
    return found


def freeze(student: nn.Module, stage: Stage) -> None:
    """Leave gradients to what `stage.train` names.

    Raises:
        InputError: the student has no such parameters.
    """
    role = roles(student)
    wanted = {"new": ("new",), "mixer": ("new", "mixer"), "all": ("new", "mixer", "rest")}[stage.train]
    for parameter in student.parameters():
        parameter.requires_grad_(role.get(id(parameter), "rest") in wanted)
    if isinstance(stage, AlignStage) and not role:
        raise InputError("stages: align needs a student with mixers; every layer of this one keeps its attention")
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError(f"stages: train: {stage.train} finds no parameters; these mixers add none")


def make_trainable(student: Any, stage: Stage, base: str, device: torch.device) -> Any:
    """The student, or its peft wrapper, ready for a stage on `device`.

    Everything that a stage decides about the model itself happens here: what is trained, the precision of what is
    not, gradient checkpointing, fused kernels, the adapter.

    Args:
        student: in float32.
        base: the folder of the student, kept in an adapter's configuration.

    Raises:
        InputError: as `freeze` and `add_adapter`.
    """
    if stage.gradient_checkpointing and not isinstance(stage, AlignStage):
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if stage.fused:
        fuse(student, device)
    if stage.adapter is None:
        freeze(student, stage)
    else:
        student = add_adapter(student, stage.adapter, base)
    if stage.precision == "bf16":
        _lower_frozen(student)
    return student


def _lower_frozen(model: nn.Module) -> None:
    """Hold the frozen matrices in bfloat16, in which autocast would compute with them anyway: the same results from
    half the memory and without a copy in every pass."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(torch.bfloat16)
        if hasattr(module, "lora_A"):
            # Else peft makes a float32 copy of every input, which autocast turns back.
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def optimizer_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay: new | mixer | rest, each with and without decay.

    An adapter's parameters follow the module they belong to. Norms, biases (one-dimensional) and the mixers' new
    parameters are not decayed.
    """
    role = roles(model)
    rate = {"mixer": stage.lr.mixer, "rest": stage.lr.rest}
    rate["new"] = stage.lr.mixer if stage.lr.new is None else stage.lr.new
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = role.get(id(parameter), "rest")
            decay = 0.0 if (kind == "new" and "lora_" not in name) or parameter.dim() < 2 else stage.weight_decay
            group = groups.setdefault(
                (kind, decay),
                {"params": [], "lr": rate[kind], "weight_decay": decay, "eps": ADAM_EPS[kind], "name": kind},
            )
            group["params"].append(parameter)
    order = ("mixer", "new", "rest")
    return sorted(groups.values(), key=lambda group: (order.index(group["name"]), -group["weight_decay"]))


def add_adapter(student: Any, options: Lora, base: str) -> Any:
    """The student in a peft wrapper with a LoRA adapter, all else frozen.

    Args:
        base: the folder of the student, kept in the adapter's configuration.

    Raises:
        InputError: `targets` match no module, or the head (whose loss is computed in chunks, past any adapter).
    """
    from peft import LoraConfig, get_peft_model

    if any(target.split(".")[-1] in ("lm_head", "embed_tokens") for target in options.targets):
        raise InputError("adapter.targets: lm_head and embed_tokens cannot have an adapter here")
    config = LoraConfig(
        r=options.r,
        lora_alpha=2 * options.r if options.alpha is None else options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(student, config)
    except ValueError as error:
        raise InputError(f"adapter.targets: {str(error).splitlines()[0]}") from None
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted
