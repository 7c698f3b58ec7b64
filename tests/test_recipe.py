"""Recipes: the shipped ones are valid, good ones say what they mean, bad ones are told all that is wrong with them."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from t2r.errors import InputError
from t2r.recipe import AlignStage, DistillStage, FinetuneStage, Recipe, dump, load_recipe, parse_recipe
from t2r.recipe.counts import format_count, parse_count
from t2r.resources import recipes_root

SHIPPED = sorted(path.stem for path in recipes_root().glob("*.yaml"))
GOOD = """\
model: {source: some/teacher}
mixer: {name: gsa}
data: {source: text.txt, sequence_length: 512}
stages:
  - {kind: align, tokens: 100M, lr: 1e-3}
  - kind: distill
    tokens: 1.5B
    lr: {mixer: 1e-4, rest: 1e-5}
    sequence_length: 1024
output: runs/x
"""


def complaints(text: str, **options: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        parse_recipe(text, name="r.yaml", **options)
    return str(error.value).splitlines()


def test_all_recipes_of_the_plan_ship() -> None:
    wanted = {"demo", "gsa-mistral-7b", "gsa-mistral-7b-paper", "gsa-llama-3-8b", "gsa-mistral-7b-lora", "recovery"}
    assert wanted <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_valid_and_opens_with_its_command(name: str) -> None:
    first = (recipes_root() / f"{name}.yaml").read_text().splitlines()[0]
    assert re.fullmatch(rf"# .*t2r (run|finetune) {name}\b.*", first)
    recipe = load_recipe(name)
    assert recipe.output == f"runs/{name}"
    assert all(stage.steps > 1 for stage in recipe.stages)
    assert parse_recipe(dump(recipe)) == recipe


def test_the_paper_recipe_is_the_papers() -> None:
    """arXiv 2409.07146, section on finetuning Mistral-7B."""
    recipe = load_recipe("gsa-mistral-7b-paper")
    (stage,) = recipe.stages
    assert isinstance(stage, FinetuneStage)
    assert (stage.tokens, stage.sequence_length, stage.warmup_steps) == (20 * 10**9, 2048, 1000)
    assert stage.lr.mixer == stage.lr.rest == 3e-5
    assert stage.batch_tokens == 2 * 2**20
    assert recipe.mixer[0].name == "gsa"
    assert recipe.mixer[0].stored()["style"] == "paper"


def test_the_main_recipe_has_the_three_stages() -> None:
    stages = load_recipe("gsa-mistral-7b").stages
    assert [type(stage) for stage in stages] == [AlignStage, DistillStage, FinetuneStage]
    assert [stage.tokens for stage in stages] == [100 * 10**6, 500 * 10**6, 100 * 10**6]


def test_a_recipe_says_what_it_means() -> None:
    recipe = parse_recipe(GOOD)
    align, distill = recipe.stages
    assert (align.tokens, distill.tokens) == (10**8, 15 * 10**8)
    assert (align.lr.mixer, align.lr.rest) == (1e-3, 1e-3)
    assert (distill.lr.mixer, distill.lr.rest) == (1e-4, 1e-5)
    assert (align.sequence_length, distill.sequence_length) == (512, 1024)
    assert recipe.data.source == ["text.txt"]
    assert recipe.mixer[0].layers == "all"
    assert parse_recipe(dump(recipe)) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_overrides_reach_lists_and_new_parts() -> None:
    overrides = ["stages.0.lr=2e-3", "stages[1].tokens=10M", "seed=3", "log.wandb=true", "generate.prompts=[a, b]"]
    recipe = parse_recipe(GOOD, overrides=overrides)
    assert recipe.stages[0].lr.mixer == 2e-3
    assert recipe.stages[1].tokens == 10**7
    assert (recipe.seed, recipe.log.wandb, recipe.generate.prompts) == (3, True, ["a", "b"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write key=value"),
        ("stages.7.lr=1", "'7' is no index of a list of 2"),
        ("stages.first.lr=1", "'first' is no index"),
        ("seed=-1", "override 'seed=-1': seed: input should be greater than or equal to 0"),
        ("stages.0.lrr=1", "override 'stages.0.lrr=1': stages.0.lrr: unknown key; did you mean 'lr'?"),
        ("output.name=x", "'name' lies below a plain value"),
        ("seed=*x", "alias"),
        ("seed=[1", "not valid YAML"),
        ("seed.x=1", "override 'seed.x=1': seed"),
        ("mixer.slots=true", "override 'mixer.slots=true': mixer.slots: input should be a valid integer, not True"),
        ("mixer.slots=[8, a]", "mixer.slots.1: input should be a valid integer, not 'a'"),
        ("stages.0.lr=-1", "stages.0.lr: input should be greater than or equal to 0, not -1"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    assert message in complaints(GOOD, overrides=[override])[0]


def test_everything_wrong_is_told_at_once_with_its_line() -> None:
    text = """\
model: {source: a, dtyp: float32}
mixer: {name: gsa, slotss: 3}
data: {source: a, validation: {sourc: b}}
stages:
  - {kind: aligm, tokens: 1M}
  - kind: distill
    tokens: 10Q
    lr: {mixer: -1, rest: .nan, foo: 3}
    teacher_topk: 3
    adapter: {kind: lora, rank: 3}
  - {tokens: 3}
  - {kind: finetune, tokens: 1000, batch_tokens: 5000}
  - {kind: finetune, tokens: true, clip: .inf, betas: [0.9], gradient_checkpointing: 1, save_every: 0}
outputs: y
"""
    told = complaints(text)
    for expected in (
        "r.yaml:1: model.dtyp: unknown key; did you mean 'dtype'?",
        "r.yaml:2: mixer.slotss: unknown key; did you mean 'slots'?",
        "r.yaml:3: data.validation.sourc: unknown key; did you mean 'source'?",
        "r.yaml:3: data.validation.source: missing",
        "r.yaml:5: stages.0.kind: unknown kind 'aligm'; did you mean 'align'?",
        "r.yaml:7: stages.1.tokens: '10Q' is no count; write 500000, 500k, 100M, 1.5B",
        "r.yaml:8: stages.1.lr.mixer: input should be greater than or equal to 0, not -1",
        "r.yaml:8: stages.1.lr.rest: input should be a finite number, not nan",
        "r.yaml:8: stages.1.lr.foo: unknown key; known: mixer, rest, new",
        "r.yaml:9: stages.1.teacher_topk: unknown key; did you mean 'teacher_top_k'?",
        "r.yaml:10: stages.1.adapter.rank: unknown key; known: kind, r, alpha, dropout, targets",
        "r.yaml:11: stages.2.kind: missing",
        "r.yaml:13: stages.4.tokens: input should be a valid integer, not True",
        "r.yaml:13: stages.4.clip: input should be a finite number, not inf",
        "r.yaml:13: stages.4.gradient_checkpointing: input should be a valid boolean, not 1",
        "r.yaml:13: stages.4.save_every: input should be greater than 0, not 0",
        "r.yaml:14: outputs: unknown key; did you mean 'output'?",
        "r.yaml:1: output: missing",
    ):
        assert expected in told
    assert any(line.startswith("r.yaml:12: stages.3: batch_tokens: 5000 is no multiple of") for line in told)
    assert len(told) == 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1]\nb: *x\n", ["r.yaml:1: anchor &x", "r.yaml:2: alias *x"]),
        ("a: {b: 1}\nc: {<<: {b: 1}}\n", ["r.yaml:2: merge key <<"]),
        ("seed: 1\nmodel: {source: a, source: b}\nseed: 2\n", ["r.yaml:2: duplicate key 'source'", "r.yaml:3: dupl"]),
        ("a: 1\n---\nb: 2\n", ["r.yaml:2: a second document"]),
        ("a: !!python/object/apply:os.system [x]\n", ["r.yaml:1: tag"]),
        ("a: !env HOME\n", ["r.yaml:1: tag"]),
        ("? [a]\n: 1\n", ["r.yaml:1: a key must be plain text"]),
        ("a: [1\n", ["r.yaml:2: not valid YAML"]),
        ("a: \0", ["r.yaml: not valid YAML"]),
        ("a: " + "[" * 1000 + "]" * 1000, ["r.yaml:1: nested more than 32 deep"]),
        ("- 1\n", ["r.yaml: a recipe is a mapping"]),
        ("text", ["r.yaml:1: text: unknown key"]),
        ("", ["r.yaml: empty"]),
        ("{}", ["r.yaml: empty"]),
        ("1: x\n", ["r.yaml:1: recipe: keys should be strings, not 1"]),
        ("output: '${oc.env:HOME}'\n", ["r.yaml:1: interpolation '${oc.env:HOME}'"]),
    ],
)
def test_what_a_recipe_may_not_hold(text: str, expected: list[str]) -> None:
    told = complaints(text)
    for line in expected:
        assert any(one.startswith(line) for one in told), told


def test_an_alias_bomb_costs_nothing(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert "anchor &a0" in complaints(bomb)[0]


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_text("# " + "x" * (256 * 1024))
    with pytest.raises(InputError, match=r"big\.yaml: 262146 bytes; a recipe has at most 262144"):
        load_recipe(big)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\n")
    with pytest.raises(InputError, match=r"binary\.yaml: not UTF-8"):
        load_recipe(binary)
    with pytest.raises(InputError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(InputError, match="no recipe of that name ships with t2r; did you mean 'demo'"):
        load_recipe("demoo")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{kind: align, tokens: 1M, train: all}", "train"),
        ("{kind: align, tokens: 1M, adapter: {kind: lora}}", "adapter"),
        ("{kind: distill, tokens: 1M, adapter: {kind: dora}}", "adapter.kind"),
        ("{kind: distill, tokens: 1M, train: mixer, adapter: {kind: lora}}", "train: 'mixer' does not go with"),
        ("{kind: distill, tokens: 1M, warmup: 1.5}", "whole number of steps"),
        ("{kind: distill, tokens: 1M, warmup: 1000}", "warmup: 1000 steps, but the stage has only 15"),
        ("{kind: distill, tokens: 1M, temperature: 0}", "temperature"),
        ("{kind: finetune, tokens: 1k}", "tokens: 1000 is less than one batch"),
        ("{kind: finetune, tokens: 1M, lr: fast}", "lr"),
        ("{kind: finetune, tokens: -5}", "tokens"),
        ("{kind: finetune, tokens: '1.5'}", "not a whole number"),
        ("{kind: finetune, tokens: 1M, schedule: cosin}", "schedule"),
        ("{kind: finetune, tokens: 1M, precision: fp16}", "precision"),
        ("{kind: finetune, tokens: 1M, evaluate_every: 5}", "stages.0.evaluate_every: needs data.validation"),
    ],
)
def test_stage_rules(stage: str, message: str) -> None:
    text = GOOD.replace("  - {kind: align, tokens: 100M, lr: 1e-3}\n", f"  - {stage}\n")
    (told,) = complaints(text)
    assert told.startswith(("r.yaml:5: stages.0", "r.yaml:1: recipe: stages.0"))
    assert message in told


@given(st.integers(1, 10**15))
def test_counts_come_back(number: int) -> None:
    assert parse_count(format_count(number)) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("100M", 10**8), ("1.5B", 15 * 10**8), ("500k", 500_000), ("2_000_000", 2 * 10**6), (1e6, 10**6)],
)
def test_counts(text: Any, number: int) -> None:
    assert parse_count(text) == number


def test_the_schema_describes_every_key() -> None:
    schema = Recipe.model_json_schema()
    assert {"model", "mixer", "data", "stages", "output"} <= set(schema["properties"])
    assert {"AlignStage", "DistillStage", "FinetuneStage"} <= set(schema["$defs"])


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_no_text_ends_in_anything_but_a_recipe_or_a_complaint(text: str) -> None:
    with contextlib.suppress(InputError):
        parse_recipe(text)


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=8),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(["model", "mixer", "data", "stages", "kind", "lr", "source", "output", "name"]),
                x,
                max_size=5,
            )
        ),
        max_leaves=20,
    )
)
def test_no_value_ends_in_anything_but_a_recipe_or_a_complaint(value: Any) -> None:
    with contextlib.suppress(InputError):
        parse_recipe(yaml.safe_dump({"stages": value, "data": value, "mixer": value, "model": value}))
