"""The student under the tools people train and score with."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from t2r.convert import convert
from t2r.model import Mixer, parse_options
from t2r.model.mixers.base import RecurrentMixer
from tests.model.conftest import HOST_CONFIGS, MIXERS, build


def gradients(model, text):
    model.zero_grad()
    model(text, labels=text, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_every_parameter(student, tokens):
    found = gradients(copy.deepcopy(student), tokens(2, 24))
    for name, _ in student.named_parameters():
        assert found[name].isfinite().all(), name
        assert found[name].abs().sum() > 0, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(mistral, tokens, reentrant):
    text = tokens(2, 20)
    mistral.train()
    expected = gradients(mistral, text)
    mistral.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(mistral, text)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_converted_student_learns(embedded_teacher, mixer_options, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded_teacher)
    text = "The old house stood at the end of the lane, and nobody had lived in it for years. " * 3
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :64]
    options = mixer_options if isinstance(mixer_options, list) else [mixer_options]
    convert(embedded_teacher, tmp_path / "student", mixers=[parse_options(one) for one in options], dtype="float32")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    losses = []
    for _ in range(4):
        loss = student(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_padding_gives_no_gradient(mistral, tokens):
    text = tokens(1, 12)
    padded, mask = torch.cat([text, text.new_zeros(1, 5)], 1), torch.tensor([[1] * 12 + [0] * 5])
    expected = gradients(mistral, text)
    mistral.zero_grad()
    labels = padded.masked_fill(mask == 0, -100)
    mistral(padded, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for name, parameter in mistral.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_autocast_gives_the_kernels_one_dtype(mistral, tokens):
    """float32 weights and positions, as another trainer's autocast leaves them; in float32 a kernel takes thrice as
    long."""
    text, seen = tokens(2, 20), []
    for module in mistral.modules():
        if isinstance(module, RecurrentMixer):
            plain = module.inputs
            module.inputs = lambda *args, plain=plain: seen.append(plain(*args)) or seen[-1]
    with torch.autocast("cpu", torch.bfloat16):
        mistral(text, labels=text, use_cache=False).loss.backward()
    assert all(x.dtype == torch.bfloat16 for inputs in seen for x in inputs[:3])
    assert all(p.grad.isfinite().all() for p in mistral.parameters())


def test_compiled_forward_equals_eager(students, tokens):
    model, text = students(), tokens(2, 20)
    with torch.no_grad():
        expected = model(text, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(text, use_cache=False).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gsa-transfer", "gsa-paper", "abc"])
def test_training_compiles_into_one_graph(kind, tokens):
    """No graph break, with gradients, on any device: where the kernels cannot run, torch's path is an operator too."""
    model, text = build(HOST_CONFIGS["mistral"](), MIXERS[kind]), tokens(2, 20)
    expected = gradients(model, text)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(text, labels=text, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3)


def test_hidden_states_are_recorded(some_mistral, tokens):
    with torch.no_grad():
        output = some_mistral(tokens(2, 9), output_hidden_states=True)
    assert [x.shape for x in output.hidden_states] == [(2, 9, 32)] * 4


def test_lora_attaches_trains_and_merges(mistral, tokens, tmp_path):
    text, plain = tokens(2, 16), copy.deepcopy(mistral)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(mistral, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(text, labels=text, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    model.eval()
    with torch.no_grad():
        again = PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(again(text).logits, model(text).logits)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(text).logits, model(text).logits, atol=1e-4, rtol=1e-3)
    assert merged.generate(text[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)


def test_trainer_takes_a_step(some_mistral, tokens, tmp_path):
    before = copy.deepcopy(some_mistral.state_dict())
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 16)]
    Trainer(some_mistral, arguments, train_dataset=rows, eval_dataset=rows).train()
    for module_name, module in some_mistral.named_modules():
        if isinstance(module, Mixer):
            for name in module.new_parameters():
                assert not torch.equal(before[f"{module_name}.{name}"], module.get_parameter(name)), name


def test_lm_eval_scores_and_generates(some_mistral, embedded_teacher):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    if not (embedded_teacher / "tokenizer.json").is_file():
        pytest.skip("SKIPPED FOR LACK OF DATA: the embedded teacher has no tokenizer")
    model = some_mistral
    tokenizer = AutoTokenizer.from_pretrained(embedded_teacher)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64, softmax_dtype="float32")
    pairs = [("The old house", " stood on a hill"), ("One", " two three four five six seven")]
    together = scorer.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    alone = [scorer.loglikelihood([Instance("loglikelihood", {}, pair, 0)])[0] for pair in pairs]
    for (a, _), (b, _) in zip(together, alone, strict=True):
        assert abs(a - b) < 1e-3
    asked = [Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 4}), 0) for text, _ in pairs]
    assert len(scorer.generate_until(asked)) == 2
