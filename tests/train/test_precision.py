"""bf16 stages: fp32 where it is trained or kept, bf16 where it is only computed with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from t2r.recipe import Recipe, RunFolder
from t2r.train import finetune
from t2r.train.trainer import StageTrainer

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize("kind", ["align", "lora"])
def test_frozen_matrices_train_in_bf16_and_are_published_as_they_were(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    dtypes: dict[bool, set[torch.dtype]] = {}
    create = StageTrainer.create_optimizer

    def spy(self: Any, model: Any = None) -> Any:
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                dtypes.setdefault(module.weight.requires_grad, set()).add(module.weight.dtype)
        return create(self, model)

    monkeypatch.setattr(StageTrainer, "create_optimizer", spy)
    stage = {"kind": "align"} if kind == "align" else {"kind": "finetune", "adapter": {"kind": "lora", "r": 2}}
    recipe = make_recipe({**stage, "precision": "bf16", "tokens": 256, "warmup": 0})
    finetune(recipe)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    folder = RunFolder(recipe)
    before, after = (load_file(path / "model.safetensors") for path in (folder.converted, folder.stages[0].model))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("self_attn" in name for name in changed)
    rounded = before["model.embed_tokens.weight"].bfloat16().float()
    assert not torch.equal(before["model.embed_tokens.weight"], rounded)  # else this test would see nothing


def test_the_residual_stream_is_bf16(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: set[torch.dtype] = set()
    create = StageTrainer.create_optimizer

    def hook(self: Any, model: Any = None) -> Any:
        for layer in self.model.model.layers:
            layer.register_forward_pre_hook(lambda module, args: streams.add(args[0].dtype))
        return create(self, model)

    monkeypatch.setattr(StageTrainer, "create_optimizer", hook)
    finetune(make_recipe({"kind": "finetune", "precision": "bf16", "tokens": 128, "warmup": 0}))
    assert streams == {torch.bfloat16}
