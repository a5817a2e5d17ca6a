"""patch() of models that it cannot speed up whole: nothing raised, no number changed, a reason."""

import copy

import pytest
import torch
from torch import nn

import slap_fast
from benchmarks.transformers_models import inputs_of, make
from tests.helpers.transformers_models import MODELS, output_of

REFUSED = {
    "BertModel": None,
    "MistralForCausalLM": None,
    "BertLMHeadModel": None,
    "BartModel": None,
    "MarianModel": None,
    "T5Model": "raises ValueError: position_bias",
    "T5EncoderModel": "raises ValueError: position_bias",
    "Gemma2ForCausalLM": "raises ValueError: softcap",
    "GptOssForCausalLM": "raises ValueError: s_aux",
    "Mamba2Model": "its forward also takes gate",
    "HieraModel": "not through transformers' interface|no call reaches|computes something else",
    "SwinModel": "no call reaches packed attention",
    "BeitModel": "raises TypeError",
    "Wav2Vec2BertModel": "raises ValueError: position_bias",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_its_numbers_and_undo_restores_it(name):
    model = make(name)
    before, state = output_of(model, name), copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    report = slap_fast.patch(model)
    norm = before.norm()
    assert (output_of(model, name) - before).norm() <= 1e-5 * norm
    if REFUSED[name] is None:
        assert report.changed("attention") > 0 and "no " not in _attention_lines(report)
    else:
        reasons = " ".join(change.why for change in report.changes if not change.changed)
        assert any(text in reasons for text in REFUSED[name].split("|")), reasons
        assert report.changed("attention") == 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    report.undo()
    assert torch.equal(output_of(model, name), before) and model.config.to_dict() == config


def _attention_lines(report):
    return "\n".join(line for line in str(report).splitlines() if line.startswith("attention"))


def test_left_padded_generation_past_a_sliding_window():
    model = make("MistralForCausalLM")
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    prompt = {"input_ids": inputs_of("MistralForCausalLM")["input_ids"], "attention_mask": mask}
    more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt, **more)
    assert slap_fast.patch(model).changed("attention")
    assert torch.equal(model.generate(**prompt, **more), expected)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = make("MistralForCausalLM")
    report = slap_fast.patch(model)
    assert not any(change.changed for change in report.changes)
    assert "has no weights yet to compare with" in str(report)


def test_a_model_that_gives_nan_is_not_proven():
    model = make("BertModel")
    nn.init.constant_(model.encoder.layer[0].attention.self.query.weight, float("nan"))
    report = slap_fast.patch(model)
    assert report.changed("attention") == 0 and "nothing to try it on" in str(report)


@pytest.mark.parametrize("times", [0.0, 1.01])
def test_a_wrong_gradient_is_not_taken(times, monkeypatch):
    from slap_fast import ops

    original = ops.attention

    def attention(q, k, v, *args, **kwargs):
        k = k.detach() + times * (k - k.detach()) if times else k.detach()
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(ops, "attention", attention)
    report = slap_fast.patch(make("BertModel"))
    assert report.changed("attention") == 0
    assert "computes something else: gradient" in str(report)


def test_what_its_own_code_raises_leaves_the_model_as_it_was(monkeypatch):
    model = make("MistralForCausalLM")
    before = output_of(model, "MistralForCausalLM")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: 1 / 0)
    report = slap_fast.patch(model)
    assert "raised ZeroDivisionError" in str(report) and not report.changed("attention")
    assert torch.equal(output_of(model, "MistralForCausalLM"), before)
    assert model.config._attn_implementation == "sdpa"


def test_eval_mode_and_random_numbers_stay():
    model = make("BertModel")
    model.encoder.train()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    slap_fast.patch(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["T5EncoderModel", "BertModel"])
def test_a_model_inside_a_module_is_patched_alike(name):
    holder = nn.ModuleDict({"text": make(name)})
    report = slap_fast.patch(holder)
    names = [change.name for change in report.changes if change.option == "attention"]
    assert names and all(path.startswith("text.") for path in names)
    assert bool(report.changed("attention")) == (REFUSED[name] is None)


def attention_of(report):
    return {change.name: change for change in report.changes if change.option == "attention"}


def test_the_report_names_the_modules_whose_calls_arrive_and_no_wrappers():
    from slap_fast.models import hf_attention

    model = make("BertLMHeadModel")
    report = slap_fast.patch(model)
    with hf_attention.recorded() as reached:
        model(**inputs_of("BertLMHeadModel"))
    parts = {name for name, module in model.named_modules() if module in reached}
    changes = [change for change in report.changes if change.option == "attention"]
    assert len(changes) == len(parts) == 4
    assert {change.name for change in changes if change.changed} == parts
    assert {change.kind for change in changes} == {"BertSelfAttention", "BertCrossAttention"}


def test_a_wrapper_of_a_part_that_is_refused_is_not_named():
    changes = attention_of(slap_fast.patch(make("MegatronBertModel")))
    assert [change.kind for change in changes.values()] == ["MegatronBertSelfAttention"] * 2


def test_a_module_whose_calls_do_not_arrive_is_no():
    """Its encoder computes attention itself, its decoder does not."""
    changes = attention_of(slap_fast.patch(make("PegasusXModel")))
    assert len(changes) == 6
    for name, change in changes.items():
        assert change.changed == name.startswith("decoder.")
        assert change.changed or change.why == "no call reaches packed attention"


def test_a_module_with_a_config_of_its_own_model_is_counted_once():
    """Both towers have their own, and the model around them a third."""
    report = slap_fast.patch(make("CLIPModel"))
    changes = [change for change in report.changes if change.option == "attention"]
    assert len(changes) == len(attention_of(report)) == report.changed("attention") == 4


def test_rounding_of_a_small_gradient_is_no_difference():
    """Of keys and queries: the model's own attentions differ by more among themselves."""
    assert slap_fast.patch(make("UniSpeechSatModel")).changed("attention") == 2
