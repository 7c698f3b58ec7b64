"""Mixers tried in memory, and layers chosen, on the teacher that ships with t2r."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from t2r.convert import convert
from t2r.convert.calibrate import Probe, calibration_windows, far_repeats, init_report
from t2r.convert.select import grouped, keep_layers, rank, without
from t2r.convert.swap import SwappedStudent
from t2r.errors import InputError
from t2r.model import assign_mixers, load, parse_options
from t2r.recipe import load_recipe
from t2r.recipe.schema import DataSource
from t2r.train.documents import read_documents
from tests.convert.conftest import HOST_CONFIGS


def texts(which):
    return read_documents(DataSource(source=[f"shipped:demo/data/{which}.parquet"]))


@pytest.fixture(scope="module")
def teacher(embedded_teacher):
    return load(embedded_teacher, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def probe(teacher):
    model, tokenizer = teacher
    return Probe(model, calibration_windows(texts("train"), tokenizer, windows=2, window=384))


@pytest.fixture(scope="module")
def held_out(teacher):
    model, tokenizer = teacher
    return Probe(model, calibration_windows(texts("validation"), tokenizer, windows=3, window=384))


def small(layers="all", **options):
    return parse_options({"name": "gsa", "slots": 16, "layers": layers} | options)


def silent(text):
    pass


@pytest.mark.parametrize("kind", HOST_CONFIGS)
def test_in_memory_it_is_the_student_that_convert_writes(hosts, tmp_path, kind):
    source = hosts(kind)
    mixers = [small("0", slots=8), parse_options({"name": "linear", "map": "t2r", "layers": "2"})]
    convert(source, tmp_path / "student", mixers=mixers, dtype="float32", seed=3)
    ids = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        teacher = load_host(source)
        before = teacher(ids).logits
        swapped = SwappedStudent(teacher, seed=3)
        assert torch.equal(swapped.model(ids, use_cache=False).logits, before)
        ours = swapped.set(assign_mixers(mixers, 3))(ids, use_cache=False).logits
        assert torch.equal(ours, load_host(tmp_path / "student")(ids, use_cache=False).logits)
        assert not torch.equal(ours, before)
        assert torch.equal(teacher(ids).logits, before)  # and the teacher is what it was
        assert torch.equal(swapped.set([None] * 3)(ids, use_cache=False).logits, before)


def load_host(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()


def test_the_score_is_what_it_says(teacher, probe):
    model, tokenizer = teacher
    ids = calibration_windows(texts("train"), tokenizer, windows=2, window=384)
    entries = assign_mixers(small(), 6)
    with torch.no_grad():
        p = model(ids[:, :-1]).logits.log_softmax(-1)
        q = SwappedStudent(model).set(entries)(ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
    loss = -q.gather(-1, ids[:, 1:, None]).mean().item()
    score = probe.score(entries)
    assert score.kl == pytest.approx(kl, rel=1e-4)
    assert score.loss == pytest.approx(loss, rel=1e-4)
    far = far_repeats(ids)
    assert score.far_kl == pytest.approx((p.exp() * (p - q)).sum(-1)[far].mean().item(), rel=1e-4)
    assert probe.score([None] * 6).kl == pytest.approx(0, abs=1e-6)


def test_far_repeats_are_pairs_seen_long_before():
    ids = torch.tensor([[7, 8, 1, 2, 3, 7, 8, 4, 7, 8]])
    assert far_repeats(ids, gap=3).nonzero().tolist() == [[0, 5]]  # at 8 it is 3 tokens ago
    assert far_repeats(ids, gap=2).nonzero().tolist() == [[0, 5], [0, 8]]


def test_windows_follow_each_other_and_share_a_token(teacher):
    _, tokenizer = teacher
    ids = calibration_windows(["One sentence.", "And another one, longer."] * 9, tokenizer, windows=3, window=20)
    assert ids.shape == (3, 21)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert torch.equal(ids[1:, 0], ids[:-1, -1])
    with pytest.raises(InputError, match=r"calibration text: .* tokens, 9 windows of 20"):
        calibration_windows(["short"], tokenizer, windows=9, window=20)


def test_the_init_report_tells_the_layers_apart(teacher, probe):
    exact = parse_options({"name": "softmax", "window": 384, "layers": "0"})
    narrow = parse_options({"name": "softmax", "window": 8, "layers": "2"})
    report = init_report(probe, assign_mixers([exact, narrow], 6))
    whole, cut = report["layers"]
    assert (whole["layer"], cut["layer"]) == (0, 2)
    assert whole["output_error"] == pytest.approx(0, abs=1e-9)
    assert whole["kl_alone"] == pytest.approx(0, abs=1e-6)
    assert 0.01 < cut["output_error"] < 1
    assert report["kl"] == pytest.approx(cut["kl_alone"], rel=1e-3)  # the other layer changes nothing
    assert report["loss"] > report["teacher_loss"]
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("method", ["greedy", "kl"])
def test_the_chosen_pair_beats_most_pairs_on_text_it_has_not_seen(probe, held_out, method):
    entries = assign_mixers(small(), 6)
    chosen = keep_layers(probe, entries, 2, method=method, tell=silent)
    every = {pair: held_out.score(without(entries, pair)).loss for pair in itertools.combinations(range(6), 2)}
    rank_of_chosen = sorted(every, key=every.__getitem__).index(tuple(chosen))
    assert rank_of_chosen <= 2, (chosen, every)
    assert every[tuple(chosen)] < every[1, 4]  # the pair that lies evenly
    first = rank(probe, entries)[0]
    assert first.layer in chosen
    assert first.kept < probe.score(entries).kl


def test_grouped_is_a_recipes_mixer():
    entries = [None, *(small(slots=n).stored() for n in (16, [16, 32], 16))]
    recipe = load_recipe("demo", [f"mixer={json.dumps(grouped(entries))}"])
    assert assign_mixers(recipe.mixer, 4) == entries


def test_the_command_writes_a_recipe_that_runs(t2r, tmp_path):
    written = tmp_path / "chosen.yaml"
    line = [
        "select-layers",
        "demo",
        "mixer={name: gsa, slots: 16}",
        "--keep",
        "1",
        "--slots",
        "16",
        "--windows",
        "1",
        "--window",
        "192",
    ]
    answer = t2r(*line, "--write", written)
    assert answer.code == 0, answer.err
    kept = int(answer.out.split("keep as softmax: ")[1].split()[0])
    recipe = load_recipe(written)
    entries = assign_mixers(recipe.mixer, 6)
    assert entries[kept] is None
    assert sum(entry is None for entry in entries) == 1
    assert sum(np.mean(entry["slots"]) for entry in entries if entry) <= 16 * 5
    expected = load_recipe("demo").model_dump(mode="json")
    assert recipe.model_dump(mode="json") | {"mixer": 0} == expected | {"mixer": 0}
    assert recipe.place.windows == 0
    before = written.read_bytes()
    again = t2r(*line, "--write", written)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "exists" in again.err
    assert written.read_bytes() == before


def test_layers_alone_leave_the_placing_to_the_run(t2r, tmp_path):
    written = tmp_path / "hybrid.yaml"
    overrides = ["mixer={name: gsa, slots: 16, layers: 3-5}", "place={windows: 2, window: 64}"]
    answer = t2r("select-layers", "demo", *overrides, "--keep", 1, "--windows", 1, "--window", 64, "--write", written)
    assert answer.code == 0, answer.err
    recipe = load_recipe(written)
    assert recipe.place.windows == 2
    assert len(recipe.mixer[0].layers.split(",")) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["demo", "--keep", "6"], "keep: 6 layers, must be between 1 and 5"),
        (["demo", "mixer={name: gla}", "--slots", "16"], "mixer gla has none"),
        (["demo", "mixer={name: gsa}", "--slots", "8"], "must be at least 16"),
        (["demo", "mixer={name: abc}", "--slots", "32"], "only gsa of style transfer"),
        (["demo", "mixer={name: gsa, ring: 20}", "--slots", "32"], "without long-lived slots"),
        (["demo", "mixer=[{name: gsa, layers: 0}, {name: gla, layers: 1}]", "--slots", "64"], "has 2 mixers"),
    ],
)
def test_what_cannot_be_chosen_is_told_in_one_line(t2r, options, told):
    answer = t2r("select-layers", *options, "--windows", "1", "--window", "16")
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith("Error: ")
    assert told in answer.err


def test_convert_reports_the_start_and_keeps_it(t2r, embedded_teacher, tmp_path):
    text = "shipped:demo/data/train.parquet"
    answer = t2r(
        "convert",
        embedded_teacher,
        tmp_path / "student",
        "--layers",
        "5",
        "--slots",
        "16",
        "--place",
        "none",
        "--calibrate",
        text,
    )
    assert answer.code == 0, answer.err
    report = json.loads((tmp_path / "student" / "conversion.json").read_text())["calibration"]
    (layer,) = report["layers"]
    assert (layer["layer"], layer["mixer"]) == (5, "gsa")
    assert layer["kl_alone"] == report["kl"] > 0.01
    assert f"{layer['output_error']:.4f}" in answer.out
    assert f"{report['loss']:.4f}, {report['loss'] - report['teacher_loss']:+.4f}" in answer.out


def test_run_reports_the_start_when_the_recipe_asks(embedded_teacher, tmp_path, capsys):
    from t2r.cli.run import prepare
    from t2r.recipe import RunFolder

    recipe = load_recipe(
        "demo", [f"output={tmp_path}", "mixer={name: gsa, layers: 5}", "calibrate={windows: 1, window: 128}"]
    )
    prepare(recipe, RunFolder(recipe), calibrate=True)
    report = json.loads((tmp_path / "converted" / "conversion.json").read_text())["calibration"]
    assert report["tokens"] == 128
    assert [layer["layer"] for layer in report["layers"]] == [5]
    assert "Before training, on 128 tokens" in capsys.readouterr().out
