"""ModernBERT packed through transformers' attention interface, against transformers' own padded
run."""

import pytest
import torch

from slap_fast.config import TextEncoderConfig
from slap_fast.models.text_encoder import TextEncoder, modernbert_config, resolve_pretrained
from slap_fast.packed import PackedText

CONFIG = TextEncoderConfig(
    vocab_size=60, hidden_size=32, num_layers=4, num_heads=2, intermediate_size=40,
    local_attention=6,
)  # fmt: skip
CAPTIONS = [[5, 6, 7], [8], list(range(10, 40)), [3, 4]]


@pytest.fixture
def checkpoint(tmp_path):
    """A ModernBERT folder as transformers writes it, and the model."""
    from transformers import ModernBertModel

    torch.manual_seed(1)
    model = ModernBertModel(modernbert_config(CONFIG)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_checkpoint_loads_unchanged_and_packed_equals_padded(checkpoint):
    folder, model = checkpoint
    config = resolve_pretrained(TextEncoderConfig(pretrained=str(folder)))
    assert config == TextEncoderConfig(
        **{f: getattr(CONFIG, f) for f in CONFIG.__slots__ if f != "pretrained"},
        pretrained=str(folder),
    )
    encoder = TextEncoder(config)
    encoder.load_pretrained(str(folder))
    packed = encoder(PackedText.from_ids(CAPTIONS))

    width = max(map(len, CAPTIONS))
    ids = torch.tensor([c + [0] * (width - len(c)) for c in CAPTIONS])
    mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in CAPTIONS])
    model.set_attn_implementation("sdpa")
    padded = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (packed - padded).norm() / padded.norm() < 1e-5


def test_local_layers_are_windowed(checkpoint):
    """30 tokens with a window of 6: the far end of a purely local stack does not see the first."""
    encoder = TextEncoder(TextEncoderConfig(**{
        **{f: getattr(CONFIG, f) for f in CONFIG.__slots__}, "num_layers": 2, "global_every": 100,
    }))  # fmt: skip
    ids = list(range(10, 40))
    a = encoder.model.layers[1].attn
    seen = []
    a.register_forward_hook(lambda _, inputs, output: seen.append(output[0][0]))
    x = torch.randn(1, 30, 32)
    for first in (0.0, 5.0):
        changed = x.clone()
        changed[0, 0] += first
        text = PackedText.from_ids([ids])
        positions = encoder.model.rotary_emb(x, text.positions.T, "sliding_attention")
        a(changed, position_embeddings=positions, cu_seq_lens_q=text.cu_seqlens, max_length_q=30)
    reach = (seen[0] != seen[1]).any(1).nonzero().max()
    assert int(reach) == 3


def test_unreadable_pretrained_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"text\.pretrained: cannot read .*pretrained=none"):
        resolve_pretrained(TextEncoderConfig(pretrained=str(tmp_path / "nothing")))


def test_another_architecture_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'bert', expected a 'modernbert'"):
        resolve_pretrained(TextEncoderConfig(pretrained=str(tmp_path)))


def test_a_modernbert_with_other_maths_is_refused(tmp_path):
    config = modernbert_config(CONFIG)
    config.norm_eps = 1e-3
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="norm_eps 0.001, expected 1e-05"):
        resolve_pretrained(TextEncoderConfig(pretrained=str(tmp_path)))
