"""patch(unpad=True): blocks run on the real tokens alone, and nobody outside of them notices."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import slap_fast
from benchmarks.transformers_models import NO_DROPOUT, SIZES, TEXT, make
from slap_fast import ops
from tests.helpers.transformers_models import MODELS, assert_same

LENGTHS = (9, 4, 6)
RIGHT = torch.tensor([[1] * n + [0] * (9 - n) for n in LENGTHS])
IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(3))
NO_IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))


def modernbert():
    ids = dict.fromkeys(("cls_token_id", "sep_token_id"))
    settings = {**TEXT, **NO_IDS, **ids, "num_hidden_layers": 4, "local_attention": 4}
    return transformers.ModernBertModel(transformers.ModernBertConfig(**settings))


def bert(**settings):
    return transformers.BertModel(transformers.BertConfig(**{**TEXT, **NO_DROPOUT, **settings}))


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(**TEXT, **NO_IDS))


def mistral(**settings):
    settings = {**TEXT, **NO_IDS, "num_key_value_heads": 1, "sliding_window": 3, **settings}
    return transformers.MistralModel(transformers.MistralConfig(**settings))


def wav2vec2(kind="Wav2Vec2", **settings):
    conv = {"conv_dim": [16], "conv_kernel": [4], "conv_stride": [4], "num_conv_pos_embeddings": 4}
    more = {"num_conv_pos_embedding_groups": 2, "vocab_size": 32, "layerdrop": 0.0}
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "mask_time_prob": 0.0}
    settings = {**SIZES, **conv, **more, **dropout, "do_stable_layer_norm": False, **settings}
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}Model")(config)


def build(make_model):
    torch.manual_seed(0)
    model = make_model().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs_of(model, mask=RIGHT):
    if "input_values" not in model.main_input_name:
        more = {"use_cache": False} if "use_cache" in model.config.to_dict() else {}
        return {"input_ids": IDS[: len(mask)], "attention_mask": mask, **more}
    samples = torch.randn(3, 36, generator=torch.Generator().manual_seed(4))
    return {"input_values": samples, "attention_mask": mask.repeat_interleave(4, 1)}


def results(model, **more):
    """Hidden states at real positions, and the gradients."""
    model.zero_grad()
    inputs = {**inputs_of(model), **more}
    hidden = model(**inputs).last_hidden_state
    real = hidden[RIGHT.bool()]
    real.pow(3).sum().backward()
    return real.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def qwen2_audio():
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2}
    more = {"encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 24}
    config = transformers.Qwen2AudioEncoderConfig(**sizes, **more)
    return transformers.Qwen2AudioEncoder(config)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("what", ["padding", "pairs", "nothing"])
def test_a_mask_of_pairs_that_is_padding_alone(what, dtype, rows):
    """As Qwen2-Audio's encoder gets it from the model around it."""
    model = build(qwen2_audio)
    mask = (torch.arange(24) < torch.tensor([24, 10])[:, None])[:, None, None].expand(2, 1, 24, 24)
    if what != "padding":
        mask = torch.ones_like(mask)
    if what == "pairs":
        mask = mask.tril()
    hidden = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    features = torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(4))
    real = torch.arange(12) < torch.tensor([12, 5 if what == "padding" else 12])[:, None]
    expected = model(features, attention_mask=hidden).last_hidden_state[real]
    patched(model, rows)
    actual = model(features, attention_mask=hidden).last_hidden_state[real]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert set(rows) == {"padding": {34}, "pairs": set(), "nothing": {48}}[what]


@pytest.fixture
def rows(monkeypatch):
    """How many tokens each attention was given."""
    seen, attend = [], ops.attention

    def attention(q, *args, **kwargs):
        seen.append(len(q))
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(ops, "attention", attention)
    return seen


def patched(model, rows):
    report = slap_fast.patch(model)
    assert report.changed("unpad") == 1, report
    rows.clear()
    return report


@pytest.mark.parametrize("make_model", [bert, modernbert, llama, wav2vec2])
def test_the_blocks_see_real_tokens_alone(make_model, rows):
    model = build(make_model)
    expected = results(model)
    report = patched(model, rows)
    assert_same(results(model), expected)
    assert set(rows) == {sum(LENGTHS)}
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooks
    report.undo()
    rows.clear()
    assert torch.equal(results(model)[0], expected[0]) and not rows
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "mask",
    [RIGHT.flip(1), torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0, 0]]), torch.ones_like(RIGHT)],
    ids=["left", "one sample", "no padding"],
)
def test_other_paddings(mask, rows):
    model = build(modernbert)
    expected = model(**inputs_of(model, mask)).last_hidden_state[mask.bool()]
    patched(model, rows)
    actual = model(**inputs_of(model, mask)).last_hidden_state
    torch.testing.assert_close(actual[mask.bool()], expected, rtol=1e-4, atol=1e-5)
    assert set(rows) == {int(mask.sum())} and actual.shape[:2] == mask.shape
    assert not actual[mask == 0].any()  # its last norm has no bias


@pytest.mark.parametrize("where", ["call", "config"])
def test_hidden_states_that_are_asked_for_are_padded(where, rows):
    model = build(bert)
    expected = model(**inputs_of(model), output_hidden_states=True).hidden_states
    patched(model, rows)
    if where == "config":
        model.config.output_hidden_states = True
        out = model(**inputs_of(model))
    else:
        out = model(**inputs_of(model), output_hidden_states=True)
    assert set(rows) == {27} and len(out.hidden_states) == len(expected)
    for a, b in zip(out.hidden_states, expected, strict=True):
        torch.testing.assert_close(a[RIGHT.bool()], b[RIGHT.bool()], rtol=1e-4, atol=1e-5)


def test_a_hook_inside_sees_padded_tensors(rows):
    model = build(bert)
    patched(model, rows)
    shapes = []
    handle = model.encoder.layer[0].output.dense.register_forward_hook(
        lambda module, args, out: shapes.append(out.shape)
    )
    model(**inputs_of(model))
    assert shapes == [(3, 9, 32)] and set(rows) == {27}
    handle.remove()
    rows.clear()
    model(**inputs_of(model))
    assert set(rows) == {19}


def test_a_cache_keeps_the_padding(rows):
    model = build(llama)
    expected = model(IDS, attention_mask=RIGHT).past_key_values
    patched(model, rows)
    cache = model(IDS, attention_mask=RIGHT).past_key_values
    assert set(rows) == {27} and cache.layers[0].keys.shape == expected.layers[0].keys.shape


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, rows):
    model = build(modernbert)
    model.train()
    expected = results(model)
    patched(model, rows)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(results(model), expected)
    assert rows == [19] * 8  # 4 blocks, twice


@pytest.mark.parametrize(
    "make_model",
    [lambda: bert(attention_probs_dropout_prob=0.3), lambda: mistral(attention_dropout=0.3)],
    ids=["BertModel", "MistralForCausalLM"],
)
def test_dropout_inside_attention_is_the_models_own(make_model, rows):
    """Not packed while it trains, with the same random numbers; packed when it does not."""
    model = build(make_model)
    evaluated = results(model)
    model.train()
    torch.manual_seed(5)
    trained = results(model)
    patched(model, rows)
    torch.manual_seed(5)
    assert_same(results(model), trained)
    assert not rows
    model.eval()
    assert_same(results(model), evaluated)
    assert set(rows) == {19}


def test_dropout_outside_of_attention_stays(rows):
    model = build(lambda: bert(hidden_dropout_prob=0.5))
    model.train()
    patched(model, rows)
    first, second = (results(model)[0] for _ in range(2))
    assert set(rows) == {19} and not torch.equal(first, second)


def test_blocks_that_are_left_out_at_random_keep_the_padding(rows):
    model = build(lambda: wav2vec2(layerdrop=0.5))
    patched(model, rows)
    model.train()
    for seed in range(8):
        torch.manual_seed(seed)
        assert model(**inputs_of(model)).last_hidden_state.shape == (3, 9, 32)
    assert set(rows) == {27}


def test_blocks_that_mix_neighbours_are_refused(monkeypatch):
    """In one row the first token of a sample would see the last one of the sample before."""
    from transformers.models.wav2vec2 import modeling_wav2vec2

    class Shifting(modeling_wav2vec2.Wav2Vec2EncoderLayer):
        def forward(self, *args, **kwargs):
            hidden = super().forward(*args, **kwargs)
            return hidden + nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))

    monkeypatch.setattr(modeling_wav2vec2, "Wav2Vec2EncoderLayer", Shifting)
    model = build(wav2vec2)
    expected = results(model)
    report = slap_fast.patch(model)
    assert report.changed("attention") and not report.changed("unpad")
    (why,) = [change.why for change in report.changes if change.option == "unpad"]
    assert why.startswith("computes something else: last_hidden_state")
    assert_same(results(model), expected)


def test_blocks_that_return_tuples(monkeypatch, rows):
    from transformers.models.bert import modeling_bert

    class Layer(modeling_bert.BertLayer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs), None

    class Encoder(modeling_bert.BertEncoder):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            for layer in self.layer:
                hidden_states = layer(hidden_states, attention_mask)[0]
            return modeling_bert.BaseModelOutputWithPastAndCrossAttentions(hidden_states)

    monkeypatch.setattr(modeling_bert, "BertLayer", Layer)
    monkeypatch.setattr(modeling_bert, "BertEncoder", Encoder)
    model = build(bert)
    expected = results(model)
    patched(model, rows)
    assert_same(results(model), expected)
    assert set(rows) == {19}


def test_a_mask_of_pairs_of_tokens_is_the_models_own(rows):
    """[B, 1, L, L]: what the attention interface cannot know to be padding alone."""
    model = build(bert)
    mask = torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    mask = mask | torch.eye(9, dtype=torch.bool)
    expected = model(IDS, attention_mask=mask).last_hidden_state
    patched(model, rows)
    actual = model(IDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not rows


def test_without_a_mask_there_is_nothing_to_unpad():
    config = transformers.ViTConfig(**SIZES, **NO_DROPOUT, image_size=32, patch_size=8)
    report = slap_fast.patch(build(lambda: transformers.ViTModel(config)))
    assert report.changed("attention") and not report.changed("unpad")
    assert "nothing to unpad: no mask of padding reaches its blocks" in str(report)


def test_attention_can_be_patched_without_it(rows):
    model = build(bert)
    report = slap_fast.patch(model, unpad=False)
    rows.clear()
    model(**inputs_of(model))
    assert set(rows) == {27} and "unpad" not in str(report)


def test_as_many_samples_as_positions(rows):
    model = build(modernbert)
    mask = torch.arange(9)[None] <= torch.arange(9)[:, None]
    inputs = {"input_ids": IDS.repeat(3, 1), "attention_mask": mask.long()}
    expected = model(**inputs).last_hidden_state[mask]
    patched(model, rows)
    actual = model(**inputs).last_hidden_state[mask]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_unpadded_too(twin_of, rows):
    model = build(bert)
    expected = results(model)
    patched(model, rows)
    twin = twin_of(model)
    nn.init.zeros_(model.encoder.layer[0].attention.self.query.weight)
    assert_same(results(twin), expected)
    assert set(rows) == {19}


def test_a_call_that_fails_leaves_no_trace(rows):
    model = build(bert)
    patched(model, rows)
    with pytest.raises(Exception, match=r"index|range"):
        model(IDS + 1000, attention_mask=RIGHT)
    other = build(bert)
    other.set_attn_implementation("slap_fast")
    other(**inputs_of(other))
    assert set(rows) == {27}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_hooks_stay_only_where_blocks_are_unpadded(name):
    model = make(name)
    report = slap_fast.patch(model)
    assert any(m._forward_pre_hooks for m in model.modules()) == (report.changed("unpad") > 0)
    report.undo()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_mask_of_pairs_compiles_without_a_graph_break():
    model = build(qwen2_audio)
    features = torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(24) < torch.tensor([24, 10])[:, None])[:, None, None].expand(2, 1, 24, 24)
    expected = model(features, attention_mask=mask).last_hidden_state
    assert slap_fast.patch(model).changed("unpad")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = compiled(features, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
