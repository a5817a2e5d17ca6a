"""A patched model copied, pickled, wrapped, saved, unpatched: its own numbers all the way."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import slap_fast
from benchmarks.transformers_batches import MASK
from benchmarks.transformers_models import inputs_of, make
from slap_fast.models import hf_attention
from tests.helpers.transformers_models import assert_same

NAMES = ("LlamaForCausalLM", "ModernBertModel", "Wav2Vec2Model", "BartModel")


def labelled():
    inputs = inputs_of("LlamaForCausalLM")
    return {**inputs, "labels": inputs["input_ids"].masked_fill(MASK == 0, -100)}


def value_of(model, name):
    """Its loss, or its hidden states at real positions."""
    if name == "LlamaForCausalLM":
        return model(**labelled()).loss
    hidden = model(**inputs_of(name)).last_hidden_state
    real = {"ModernBertModel": 5, "Wav2Vec2Model": 12}.get(name, hidden.shape[1])
    return torch.cat([hidden[0], hidden[1, :real]])


def outcome(model, name):
    """The value, and its gradients."""
    model.zero_grad()
    value = value_of(model, name)
    value.pow(2).sum().backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def spoil(model):
    for parameter in model.parameters():
        nn.init.zeros_(parameter)


def replica_of(model):
    """As DataParallel makes it, without the devices; the weights are plain copies."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas.get(child)
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter * 1)
    return replicas[model]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_runs_on_its_own_weights(name):
    model = make(name)
    expected = outcome(model, name)
    report = slap_fast.patch(model)
    twin = copy.deepcopy(model)
    copies = [twin]
    if name != "Wav2Vec2Model":  # torch refuses to pickle its parametrized convolution
        copies.append(pickle.loads(pickle.dumps(model)))
    spoil(model)
    for again in copies:
        assert type(again) is type(model)
        assert_same(outcome(again, name), expected)
    report.undo()
    assert twin.config._attn_implementation == hf_attention.NAME


@pytest.mark.parametrize("name", NAMES)
def test_a_replica_runs_on_its_own_weights(name):
    model = make(name)
    expected = outcome(model, name)[0]
    slap_fast.patch(model)
    replica = replica_of(model)
    spoil(model)
    actual = value_of(replica, name).detach()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_saved_model_runs_in_a_process_that_imports_torch_alone(tmp_path):
    model = make("BertModel")
    inputs = inputs_of("BertModel")
    slap_fast.patch(model)
    expected = model(**inputs).last_hidden_state
    torch.save((model, inputs, expected), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, inputs, expected = torch.load(sys.argv[1], weights_only=False);"
        "torch.testing.assert_close(model(**inputs).last_hidden_state, expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_the_name_of_the_attention_is_known_wherever_it_is_unpickled(monkeypatch):
    from transformers import AttentionInterface, AttentionMaskInterface

    hf_attention.register()
    pickled = pickle.dumps(hf_attention.NAME)
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, "slap_fast")
    assert pickle.loads(pickled) == "slap_fast"
    assert AttentionInterface()["slap_fast"] is hf_attention.packed_attention
    assert "slap_fast" in AttentionMaskInterface()


def test_a_config_that_is_copied_in_the_probe_leaves_it_recording():
    hf_attention.register()
    with hf_attention.recorded() as reached:
        copy.deepcopy(hf_attention.NAME)
        from transformers import AttentionInterface

        assert AttentionInterface()["slap_fast"] is not hf_attention.packed_attention
    assert reached == []


def test_save_pretrained_writes_the_models_own_class_and_attention(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make("LlamaForCausalLM")
    expected = outcome(model, "LlamaForCausalLM")
    kind = type(model)
    slap_fast.patch(model).changed("linear_cross_entropy")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is kind and again.config._attn_implementation == "sdpa"
    assert_same(outcome(again, "LlamaForCausalLM"), expected)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BartModel"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing(name, use_reentrant):
    model = make(name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    expected = outcome(model, name)
    slap_fast.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(outcome(model, name), expected)


@pytest.mark.slow
def test_compile_with_graph_breaks():
    model = make("LlamaForCausalLM")
    expected = outcome(model, "LlamaForCausalLM")
    slap_fast.patch(model)
    inputs = labelled()
    compiled = torch.compile(model, backend="eager")
    loss = compiled(**inputs, use_cache=False).loss
    torch.testing.assert_close(loss.detach(), expected[0])


@pytest.fixture
def accelerate():
    """The package; its settings, which a process has once, are forgotten after the test."""
    package = pytest.importorskip("accelerate")
    yield package
    package.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_wraps_and_unwraps(accelerate):
    model = make("LlamaForCausalLM")
    inputs = labelled()
    own = model(**inputs)
    report = slap_fast.patch(model)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    out = prepared(**inputs)
    accelerator.backward(out.loss)
    assert abs(out.loss - own.loss) < 0.02 * own.loss
    with pytest.raises(RuntimeError, match="logits: patch"):
        out.logits  # noqa: B018
    assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    out = model(**inputs)
    assert "logits" not in out.keys() and torch.allclose(out.loss, own.loss)
    report.undo()
    assert torch.equal(model(**inputs).logits, own.logits)


def test_an_output_without_logits_is_rebuilt_as_one():
    """As accelerate, DataParallel's gather and pytrees do."""
    model = make("LlamaForCausalLM")
    inputs = labelled()
    slap_fast.patch(model)
    out = model(**inputs, use_cache=False)
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    for again in (
        type(out)(dict(out)),
        type(out)(pair for pair in out.items()),
        torch.utils._pytree.tree_unflatten(leaves, spec),
    ):
        assert again.loss is out.loss and list(again) == ["loss"] and again.hidden_states is None
        with pytest.raises(RuntimeError, match="logits: patch"):
            again["logits"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first to last", "last to first"])
@pytest.mark.parametrize("first", ["attention", "swiglu"])
def test_two_patches_are_undone_in_any_order(first, order):
    model = make("LlamaForCausalLM")
    before, config = outcome(model, "LlamaForCausalLM"), model.config.to_dict()
    types = [type(module) for module in model.modules()]
    everything = ("attention", "rms_norm", "swiglu", "linear_cross_entropy")
    reports = [
        slap_fast.patch(model, **{option: option == first for option in everything}),
        slap_fast.patch(model),
    ]
    assert not reports[1].changed(first)
    assert "already" in str(reports[1]) or "replaced before" in str(reports[1])
    for number in order:
        reports[number].undo()
        reports[number].undo()
    assert [type(module) for module in model.modules()] == types
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == config
    again = outcome(model, "LlamaForCausalLM")
    assert torch.equal(again[0], before[0])
    assert all(map(torch.equal, again[1], before[1]))


def test_a_first_patch_undone_leaves_the_second_at_work():
    model = make("LlamaForCausalLM")
    first = slap_fast.patch(model, swiglu=False)
    second = slap_fast.patch(model)
    first.undo()
    assert second.changed("swiglu") and not second.changed("attention")
    assert model.config._attn_implementation == "sdpa"
    assert "_slap_fast_forward" in model.model.layers[0].mlp.__dict__
    assert "_slap_fast_forward" not in model.model.norm.__dict__


def test_undo_keeps_what_changed_since():
    model = make("LlamaForCausalLM")
    shared = model.config
    report = slap_fast.patch(model)
    model.resize_token_embeddings(80)
    model.config.pad_token_id = 3
    model.model.norm.weight.data.fill_(0.5)
    model.loss_function = lambda *args, **kwargs: torch.tensor(7.0)
    model.lm_head = nn.Linear(32, 80, bias=False)
    model.model.layers[0].mlp.up_proj = Adapted(model.model.layers[0].mlp.up_proj)
    report.undo()
    assert model.config.vocab_size == 80 and model.config.pad_token_id == 3
    assert model.config._attn_implementation == "sdpa"
    assert shared.vocab_size == 64 and shared.pad_token_id is None
    assert model.model.norm.weight[0] == 0.5 and model.lm_head.out_features == 80
    assert isinstance(model.model.layers[0].mlp.up_proj, Adapted)
    ids = torch.tensor([[70, 79, 3]])
    out = model(ids, labels=ids)
    assert out.loss == 7 and out.logits.shape == (1, 3, 80)


def test_undo_keeps_an_attention_that_was_chosen_since():
    model = make("BertModel")
    report = slap_fast.patch(model)
    model.set_attn_implementation("eager")
    report.undo()
    assert model.config._attn_implementation == "eager"


def test_a_patch_that_changes_no_attention_leaves_the_config_shared():
    model = make("T5EncoderModel")
    config = model.config
    assert not slap_fast.patch(model).changed("attention")
    assert model.config is config


def test_modes_stay_in_the_loss_probe_too():
    model = make("LlamaForCausalLM")
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert slap_fast.patch(model).changed("linear_cross_entropy")
    assert [module.training for module in model.modules()] == modes


class Adapted(nn.Module):
    """A linear layer with a low-rank update, as adapters wrap it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.weight = base.weight
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("part", ["head", "inside"])
def test_an_adapter_added_since_is_honoured(part):
    model = make("LlamaForCausalLM")
    slap_fast.patch(model)
    twin = make("LlamaForCausalLM")
    for each in (model, twin):
        torch.manual_seed(1)
        if part == "head":
            each.lm_head = Adapted(each.lm_head)
        else:
            each.model.layers[0].mlp.up_proj = Adapted(each.model.layers[0].mlp.up_proj)
    inputs = labelled()
    results = [each(**inputs) for each in (model, twin)]
    assert ("logits" in results[0].keys()) == (part == "head")
    for out in results:
        out.loss.backward()
    torch.testing.assert_close(results[0].loss, results[1].loss)
    grads = [dict(each.named_parameters()) for each in (model, twin)]
    for name, parameter in grads[1].items():
        torch.testing.assert_close(grads[0][name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_head_that_is_tied_or_resized_since():
    from transformers import LlamaForCausalLM

    settings = make("LlamaForCausalLM").config.to_dict() | {"tie_word_embeddings": True}
    config = LlamaForCausalLM.config_class.from_dict(settings)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    twin = copy.deepcopy(model)
    slap_fast.patch(model)
    inputs = labelled()
    for size in (None, 80):
        losses = []
        for each in (model, twin):
            if size:
                torch.manual_seed(2)
                each.resize_token_embeddings(size)
            assert each.lm_head.weight is each.model.embed_tokens.weight
            each.zero_grad()
            out = each(**inputs)
            out.loss.backward()
            losses.append((out.loss.detach(), each.lm_head.weight.grad))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
