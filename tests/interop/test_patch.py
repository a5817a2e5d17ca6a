"""patch(): third-party models give the same numbers on our operations, and are restored exactly."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

import slap_fast
from slap_fast import ops
from slap_fast.interop import replaced_forward
from slap_fast.packed import starts_of

IDS = torch.randint(4, 60, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor(
    [[1] * 12, [1] * 5 + [0] * 7, [0] * 3 + [1] * 9]
)  # unpadded, right padded, left padded
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
GROUPED = {"num_hidden_layers": 2, "num_key_value_heads": 2, **SIZES, **NO_IDS}


def modernbert():
    from transformers import ModernBertConfig, ModernBertModel

    more = {"num_hidden_layers": 4, "local_attention": 6, "cls_token_id": None}
    return ModernBertModel(ModernBertConfig(**SIZES, **NO_IDS, **more, sep_token_id=None))


def ast():
    from transformers import ASTConfig, ASTModel

    more = {"num_hidden_layers": 2, "max_length": 64, "num_mel_bins": 32}
    return ASTModel(ASTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **more))


def eurobert():
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    return EuroBertForMaskedLM(EuroBertConfig(**GROUPED, mask_token_id=3))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**GROUPED))


def inputs_of(model):
    if type(model).__name__ == "ASTModel":
        generator = torch.Generator().manual_seed(2)
        return {"input_values": torch.randn(2, 64, 32, generator=generator)}
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if model.get_output_embeddings() is not None:
        inputs["labels"] = IDS.masked_fill(MASK == 0, -100)
    return inputs


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def run(model):
    """Output at the real tokens, or the loss, and every gradient."""
    model.zero_grad()
    inputs = inputs_of(model)
    out = model(**inputs)
    value = out.loss if "labels" in inputs else out.last_hidden_state
    if value.ndim and "attention_mask" in inputs:
        value = value[MASK.bool()]
    value.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": value.detach(), **grads}


def differences(actual, expected):
    assert actual.keys() == expected.keys()
    norm = torch.stack([x.norm() for name, x in expected.items() if name != "out"]).norm()
    for name, x in expected.items():
        yield float((actual[name] - x).norm() / (x.norm() if name == "out" else norm))


OPTIONS = {"attention", "unpad", "rms_norm", "swiglu", "linear_cross_entropy"}
CHANGED = {
    modernbert: {"attention": 4},
    ast: {"attention": 2},
    eurobert: {"attention": 2, "rms_norm": 5, "swiglu": 2, "linear_cross_entropy": 1},
    llama: {"attention": 2, "rms_norm": 5, "swiglu": 2, "linear_cross_entropy": 1},
}


@pytest.mark.parametrize("make", CHANGED, ids=lambda make: make.__name__)
def test_outputs_and_gradients_stay_and_undo_restores_exactly(make, monkeypatch):
    model = build(make)
    before, modules = run(model), dict(model.named_modules())
    types = {name: (type(m), set(m.__dict__)) for name, m in modules.items()}
    state, config = list(model.state_dict()), model.config

    calls = []
    original = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    report = slap_fast.patch(model)
    options = ("attention", "rms_norm", "swiglu", "linear_cross_entropy")
    assert {o: report.changed(o) for o in options if report.changed(o)} == CHANGED[make]
    assert list(model.state_dict()) == state
    calls.clear()
    assert max(differences(run(model), before)) < 1e-5
    assert len(calls) == CHANGED[make]["attention"]

    report.undo()
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == types
    assert model.config is config
    calls.clear()
    again = run(model)
    assert not calls
    assert all(torch.equal(again[name], x) for name, x in before.items())


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_each_option_can_be_left_out(option):
    report = slap_fast.patch(build(llama), **{option: False})
    assert report.changed(option) == 0 and option not in str(report)
    assert {change.option for change in report.changes} == OPTIONS - {option} - (
        {"unpad"} if option == "attention" else set()
    )


def test_the_report_is_a_table_with_reasons():
    text = str(slap_fast.patch(build(modernbert)))
    assert "attention  yes      4 x ModernBertAttention     packed attention for" in text
    assert "swiglu     no       4 x ModernBertMLP           computes something else" in text


def test_packed_inputs_stay_packed():
    model = build(modernbert)
    padded = model(**inputs_of(model)).last_hidden_state[MASK.bool()]
    slap_fast.patch(model)
    lengths = MASK.sum(1).tolist()
    # What the left padded caption's positions were in the batch: rotary angles are relative.
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = model(
        input_ids=IDS[MASK.bool()][None],
        position_ids=positions[None],
        cu_seq_lens_q=starts_of(lengths),
        max_length_q=max(lengths),
    ).last_hidden_state[0]
    assert (packed - padded).norm() / padded.norm() < 1e-5


def test_position_ids_alone_pack_too():
    model = build(llama)
    parts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    alone = torch.cat([model(torch.tensor([part])).logits[0] for part in parts])
    slap_fast.patch(model)
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    ids = torch.tensor([sum(parts, [])])
    packed = model(ids, position_ids=positions, use_cache=False).logits[0]
    assert (packed - alone).norm() / alone.norm() < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast_reaches_the_attention(use_cache, monkeypatch):
    """Its rotary embedding gives fp32 q and k beside v in bf16, as in Trainer(bf16=True)."""
    model, seen, attend = build(llama), [], ops.attention
    expected = model(IDS).logits
    slap_fast.patch(model)

    def spy(q, k, v, *arguments, **options):
        seen.extend(x.dtype for x in (q, k, v))
        return attend(q, k, v, *arguments, **options)

    monkeypatch.setattr(ops, "attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS, use_cache=use_cache).logits
    logits.float().square().sum().backward()
    assert len(seen) == 6 and set(seen) == {torch.bfloat16}
    assert (logits - expected).norm() / expected.norm() < 2e-2


def test_generation_with_a_cache_is_the_same():
    model = build(llama)
    prompt = {"input_ids": IDS[:2, :5], "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])}
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt, **more)
    slap_fast.patch(model)
    assert torch.equal(model.generate(**prompt, **more), expected)


def test_a_static_cache_is_refused():
    model = build(llama)
    slap_fast.patch(model)
    with pytest.raises(ValueError, match="past_key_values: found .* not a static one"):
        model.generate(IDS[:1, :5], max_new_tokens=4, cache_implementation="static", pad_token_id=0)


def test_one_instance_is_patched_not_its_class_or_config():
    model = build(llama)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    expected = other(IDS).logits
    slap_fast.patch(model)
    assert other.config._attn_implementation == "sdpa"
    assert not replaced_forward.is_replaced(other.model.norm)
    assert torch.equal(other(IDS).logits, expected)


def test_a_patched_model_can_be_copied_and_shows_its_signature():
    model = build(llama)
    signature = inspect.signature(model.forward)
    slap_fast.patch(model)
    assert inspect.signature(model.forward) == signature
    twin = copy.deepcopy(model)
    nn.init.zeros_(model.model.norm.weight)
    assert twin(IDS).logits.abs().max() > 0


class OtherRMSNorm(nn.Module):
    """Gemma's: the weight is a distance from 1."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class EpsilonRMSNorm(OtherRMSNorm):
    """Keeps its epsilon outside of the root."""

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class DroppingSwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.w2(nn.functional.silu(self.w1(x)) * self.w3(x)))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (OtherRMSNorm(), "computes something else"),
        (EpsilonRMSNorm(), "computes something else"),
        (DroppingSwiGLU(), "has dropout inside"),
        (nn.MultiheadAttention(8, 2), "torch's own is not replaced"),
    ],
    ids=["1 + weight", "epsilon outside", "dropout", "nn"],
)
def test_a_lookalike_is_not_patched(module, why):
    report = slap_fast.patch(nn.Sequential(module))
    assert [change.changed for change in report.changes] == [False]
    assert why in str(report) and not replaced_forward.is_replaced(module)


class TimmAttention(nn.Module):
    """The attention of timm's vision transformers, with its names."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.q_norm = nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(
            self.q_norm(q), k, v, attn_mask, is_causal=is_causal
        )
        return self.proj(out.transpose(1, 2).flatten(2))


def test_a_timm_style_attention_is_replaced_and_one_with_norms_is_not():
    layer, x = TimmAttention(), torch.randn(3, 7, 32)
    expected = layer(x), layer(x, is_causal=True)
    report = slap_fast.patch(layer)
    assert report.changed("attention") == 1
    torch.testing.assert_close((layer(x), layer(x, is_causal=True)), expected)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, mask), expected[1])
    report.undo()
    layer.q_norm = nn.LayerNorm(8)
    assert slap_fast.patch(layer).changed("attention") == 0


def kept_bytes(model, inputs):
    """Of the activations that a training step keeps for its backward."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**inputs).loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("option", "spared"),
    # Of 100 x 50 tokens: the SiLU's output in 2 layers; the log-probabilities of 60 ids.
    [("swiglu", 2 * 5000 * 48 * 4), ("linear_cross_entropy", 5000 * 60 * 4)],
)
def test_less_is_saved_for_the_backward(option, spared):
    model = build(llama)
    ids = torch.randint(60, (100, 50))
    inputs = {"input_ids": ids, "labels": ids}
    before = kept_bytes(model, inputs)
    off = dict.fromkeys(["attention", "rms_norm", "swiglu", "linear_cross_entropy"], False)
    slap_fast.patch(model, **{**off, option: True})
    assert kept_bytes(model, inputs) <= before - 0.99 * spared


def test_the_loss_is_divided_by_num_items_in_batch_and_logits_come_without_labels():
    model = build(llama)
    inputs = {**inputs_of(model), "num_items_in_batch": torch.tensor(7)}
    expected, logits = model(**inputs).loss, model(IDS).logits
    slap_fast.patch(model, attention=False)
    assert torch.allclose(model(**inputs).loss, expected, rtol=1e-5)
    assert torch.allclose(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_logits_that_were_never_made_raise_when_they_are_read():
    model = build(llama)
    inputs = inputs_of(model)
    own = model(**inputs)
    slap_fast.patch(model)
    out = model(**inputs)
    assert torch.allclose(out.loss, own.loss, rtol=1e-5) and out[0] is out["loss"] is out.loss
    assert "logits" not in out.keys() and dict(out.items()).keys() == out.keys()
    for read in (
        lambda: out.logits,
        lambda: out["logits"],
        lambda: out[1],
        lambda: out[1:],
        lambda: out.to_tuple(),
    ):
        with pytest.raises(RuntimeError, match="logits: patch.* makes none of a batch with labels"):
            read()
    as_tuple = model(**inputs, return_dict=False)
    with torch.no_grad():
        evaluated = model(**inputs)
    real = MASK.bool()
    for logits in (as_tuple[1], evaluated.logits, evaluated[1]):
        torch.testing.assert_close(logits[real], own.logits[real], rtol=1e-4, atol=1e-5)


def test_a_loss_or_a_head_that_changed_since_is_the_model_s_own():
    model = build(llama)
    inputs = inputs_of(model)
    slap_fast.patch(model)
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    twice = model(**inputs).logits
    model.lm_head._forward_hooks.clear()
    torch.testing.assert_close(twice, 2 * model(IDS, attention_mask=MASK).logits)
    model.resize_token_embeddings(64)
    assert model(**inputs).loss.isfinite()
    model.loss_function = lambda *args, **kwargs: torch.tensor(7.0)
    assert model(**inputs).loss == 7


@pytest.fixture
def patch_traceably(monkeypatch):
    """patch(), then in place of the engine, which reads lengths back, an opaque operation, as
    kernels are."""

    def attention(q, k, v, cu_seqlens, max_seqlen, *, cu_seqlens_k=None, **_):
        return q * (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)[-1]

    def patch(model):
        assert slap_fast.patch(model).changed("attention")
        monkeypatch.setattr(ops, "attention", attention)

    return patch


def test_a_patched_encoder_compiles_without_a_graph_break(patch_traceably):
    model = build(modernbert)
    inputs = inputs_of(model)
    patch_traceably(model)
    expected = model(**inputs).last_hidden_state
    actual = torch.compile(model, backend="eager", fullgraph=True)(**inputs).last_hidden_state
    torch.testing.assert_close(actual[MASK.bool()], expected[MASK.bool()])


def test_a_compiled_causal_model_requires_an_attention_mask(patch_traceably):
    model = build(lambda: llama().model)
    patch_traceably(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(IDS, attention_mask=MASK, use_cache=False).last_hidden_state
    actual = compiled(IDS, attention_mask=MASK, use_cache=False).last_hidden_state
    torch.testing.assert_close(actual[MASK.bool()], expected[MASK.bool()])
    with pytest.raises(Exception, match="attention_mask: found none under torch.compile"):
        compiled(IDS, use_cache=False)


def test_nothing_is_patched_on_import():
    code = (
        "import transformers, slap_fast.interop.patch, slap_fast.models.hf_attention as a; "
        "assert a.NAME not in transformers.AttentionInterface(); "
        "slap_fast.interop.patch.patch; "
        "assert a.NAME not in transformers.AttentionMaskInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
