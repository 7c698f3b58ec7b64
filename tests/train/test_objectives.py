"""What the stages minimise: their gradients reach what they train, padding and frozen parts stay out."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from t2r.errors import InputError
from t2r.model.mixers import Mixer
from t2r.recipe import Recipe
from t2r.train.documents import open_source
from t2r.train.objectives import Objective, make_objective, token_loss
from t2r.train.packing import IGNORE, Batches, PackedRows
from t2r.train.parameters import add_adapter, freeze, optimizer_groups
from t2r.train.schedule import schedule

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def batch(make_recipe: MakeRecipe, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Four packed rows of 64 tokens, several documents in each."""
    source = open_source(make_recipe({"kind": "align"}).data)
    rows = PackedRows(source, tokenizer, length=64, seed=0, block=16)
    return next(islice(Batches(rows, size=4, rank=0, world=1), 1))[0]


def gradients(objective: Objective, student: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    student.zero_grad()
    objective.loss(student, batch, **objective.prepare(batch)).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def align_stage(make_recipe: MakeRecipe, **options: Any) -> Any:
    return make_recipe({"kind": "align", **options}).stages[0]


def test_align_is_the_relative_error_of_each_mixer_on_the_teachers_input(
    make_recipe: MakeRecipe, models_pair: tuple[Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    """With the teacher's own attention output in the mixer's place the loss is 0; with zeros it is 1."""
    teacher, student = models_pair
    objective = make_objective(align_stage(make_recipe), teacher)
    prepared = objective.prepare(batch)
    assert len(prepared["targets"]) == 3
    mixers = [layer.self_attn for layer in student.model.layers if isinstance(layer.self_attn, Mixer)]
    assert len(mixers) == 2
    converted = [prepared["targets"][i] for i in (0, 2)]
    for mixer, (hidden, _, target) in zip(mixers, converted, strict=True):
        mixer.forward = lambda hidden_states, expected=hidden, target=target, **_: (
            target if torch.equal(hidden_states, expected) else None,
            None,
        )
    assert objective.loss(student, batch, **prepared).item() == 0.0
    for mixer, (_, _, target) in zip(mixers, converted, strict=True):
        mixer.forward = lambda target=target, **_: (torch.zeros_like(target), None)
    assert objective.loss(student, batch, **prepared).item() == pytest.approx(1.0)


def test_align_gradients_survive_gradient_checkpointing(
    make_recipe: MakeRecipe, models_pair: tuple[Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    teacher, student = models_pair
    plain = align_stage(make_recipe)
    freeze(student, plain)
    expected = gradients(make_objective(plain, teacher), student, batch)
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert set(expected) == trained
    assert all(".self_attn." in name and "layers.1." not in name for name in trained)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
    saved = align_stage(make_recipe, gradient_checkpointing=True)
    found = gradients(make_objective(saved, teacher), student, batch)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_distill_gradients_survive_gradient_checkpointing(
    make_recipe: MakeRecipe, models_pair: tuple[Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    teacher, student = models_pair
    objective = make_objective(make_recipe({"kind": "distill"}).stages[0], teacher)
    student.train()
    expected = gradients(objective, student, batch)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(objective, student, batch)
    assert {n for n, _ in student.named_parameters()} == set(expected) == set(found)
    for name in expected:
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"teacher_top_k": 5, "ce_weight": 0.2}, {"temperature": 2.0}])
def test_distill_is_the_dense_formula_on_the_counted_tokens(
    make_recipe: MakeRecipe, models_pair: tuple[Any, Any], batch: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    teacher, student = models_pair
    batch["labels"][:, -20:] = IGNORE
    objective = make_objective(make_recipe({"kind": "distill", **options}).stages[0], teacher)
    value = objective.loss(student, batch, **objective.prepare(batch))
    place = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q")}
    with torch.no_grad():
        q, p = (model(**place, use_cache=False).logits.flatten(0, 1).double() for model in (student, teacher))
    labels = batch["labels"].flatten()
    tau, counted = options.get("temperature", 1.0), labels != IGNORE
    p, q, labels = p[counted], q[counted], labels[counted]
    log_p, log_q = (F.log_softmax(x / tau, -1) for x in (p, q))
    if k := options.get("teacher_top_k"):
        top = log_p.topk(k).indices
        log_p, log_q = (
            torch.cat([x.gather(-1, top), torch.log1p(-x.gather(-1, top).exp().sum(-1, keepdim=True))], -1)
            for x in (log_p, log_q)
        )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * tau**2
    expected = expected + options.get("ce_weight", 0.0) * F.cross_entropy(q, labels)
    assert value.item() == pytest.approx(expected.item(), rel=2e-4)


def test_top_k_must_be_below_the_vocabulary(make_recipe: MakeRecipe, models_pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="teacher_top_k: 260 must be below the vocabulary of 260"):
        make_objective(make_recipe({"kind": "distill", "teacher_top_k": 260}).stages[0], models_pair[0])


def test_padding_does_not_change_the_distill_loss(
    make_recipe: MakeRecipe, models_pair: tuple[Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    teacher, student = models_pair
    objective = make_objective(make_recipe({"kind": "distill"}).stages[0], teacher)
    batch["labels"][:, -10:] = IGNORE
    value = objective.loss(student, batch, **objective.prepare(batch))
    batch["input_ids"][:, -10:] = 7  # causal: what stands at the masked end reaches no counted token
    assert objective.loss(student, batch, **objective.prepare(batch)).item() == pytest.approx(value.item(), rel=1e-6)


def test_finetune_is_the_models_own_loss(
    make_recipe: MakeRecipe, models_pair: tuple[Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    student = models_pair[1]
    value = make_objective(make_recipe({"kind": "finetune"}).stages[0], None).loss(student, batch)
    place = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q")}
    logits = student(**place, use_cache=False).logits.flatten(0, 1)
    assert value.item() == pytest.approx(F.cross_entropy(logits, batch["labels"].flatten()).item(), rel=1e-5)


def test_an_installed_objective_leaves_the_student_as_it_was(
    make_recipe: MakeRecipe, models_pair: tuple[Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    student = models_pair[1]
    objective = make_objective(make_recipe({"kind": "finetune"}).stages[0], None)
    with objective.installed(student):
        assert student(**batch).dim() == 0
        assert student(**batch, validation=True).item() == pytest.approx(token_loss(student, batch).item())
    assert student(input_ids=batch["input_ids"]).logits.shape == (4, 64, 260)


def test_optimizer_groups_separate_rates_and_decay(make_recipe: MakeRecipe, models_pair: tuple[Any, Any]) -> None:
    student = models_pair[1]
    stage = make_recipe(
        {"kind": "distill", "lr": {"mixer": 1e-3, "rest": 1e-4, "new": 1e-2}, "weight_decay": 0.5}
    ).stages[0]
    freeze(student, stage)
    groups = optimizer_groups(student, stage)
    names = {id(p): n for n, p in student.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(names) == sum(len(g["params"]) for g in groups)
    assert {g["name"]: g["eps"] for g in groups} == {"new": 1e-15, "mixer": 1e-8, "rest": 1e-8}
    assert found["model.layers.0.self_attn.q_proj.weight"] == (1e-3, 0.5)
    assert found["model.layers.0.self_attn.gate_proj.weight"] == (1e-2, 0.0)
    assert found["model.layers.0.self_attn.clock_amplitude"] == (1e-2, 0.0)
    assert found["model.layers.0.mlp.gate_proj.weight"] == (1e-4, 0.5)
    assert found["model.layers.1.self_attn.q_proj.weight"] == (1e-4, 0.5)  # that layer has no mixer
    assert found["model.layers.0.input_layernorm.weight"] == (1e-4, 0.0)


@pytest.mark.parametrize(("train", "count"), [("new", 6), ("mixer", 14), ("all", None)])
def test_freeze(make_recipe: MakeRecipe, models_pair: tuple[Any, Any], train: str, count: int | None) -> None:
    student = models_pair[1]
    freeze(student, make_recipe({"kind": "finetune", "train": train}).stages[0])
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert len(trained) == (count or len(list(student.parameters())))


def test_adapters_refuse_the_head_and_unknown_targets(make_recipe: MakeRecipe, models_pair: tuple[Any, Any]) -> None:
    for targets, message in ((["lm_head"], "cannot have an adapter"), (["q_prj"], "adapter.targets")):
        stage = make_recipe({"kind": "finetune", "adapter": {"kind": "lora", "targets": targets}}).stages[0]
        with pytest.raises(InputError, match=message):
            add_adapter(models_pair[1], stage.adapter, "base")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "cosine", "warmup": 2, "min_lr_ratio": 0.0}, {0: 1 / 3, 1: 2 / 3, 5: 0.5, 9: 0.0}),
        ({"schedule": "linear", "warmup": 0, "min_lr_ratio": 0.5}, {0: 0.95, 4: 0.75, 9: 0.5}),
        ({"schedule": "constant", "warmup": 0.2}, {0: 1 / 3, 2: 1.0, 9: 1.0}),
        (
            {"schedule": "constant-with-decay", "warmup": 0, "decay": 0.4, "min_lr_ratio": 0.0},
            {0: 1.0, 5: 1.0, 6: 0.75, 8: 0.25, 9: 0.0},
        ),
    ],
)
def test_schedules(make_recipe: MakeRecipe, options: dict[str, Any], expected: dict[int, float]) -> None:
    stage = make_recipe({"kind": "align", "tokens": 1280, **options}).stages[0]
    assert stage.steps == 10
    factor = schedule(stage)
    for step, value in expected.items():
        assert factor(step) == pytest.approx(value), step
    assert factor(10) == factor(9)  # the scheduler asks once more after the last step


def test_data_files_of_a_recipe_may_be_shipped_ones(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"kind": "align"}, data={"source": "shipped:demo/data/validation.parquet"})
    assert next(open_source(recipe.data).open(None, None))
