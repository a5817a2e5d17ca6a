"""patch() on a padded batch: `python -m benchmarks.model.unpadding [--json FILE]`.

transformers' own encoders with random weights, on one batch of log-uniform lengths, 1/32 of the
longest to the longest: as they are, padded to the longest or sorted into buckets of their own
lengths; and patched, padded to the longest. Wav2Vec2 is its transformer, and its blocks with next
to no convolution in front; Qwen2-Audio's encoder takes inputs of one length only, AST and ViT have
no padding. Outputs are compared at real positions before anything is timed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import slap_fast
from benchmarks import harness

TOLERANCE = 1e-4
BATCH = 16
LONGEST = 512
BUCKETS = (4, 8, 16)
PATCHED = "patched"


class Size(NamedTuple):
    """Of a model."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


class Subject(NamedTuple):
    """Somebody else's encoder."""

    model: nn.Module
    encode: Callable[[Any, Tensor, Tensor], Tensor]
    """(model, batch, mask bool [B, L]) -> hidden states [B, positions, C]."""
    batch: Tensor
    """[B, L, ...]."""
    buckets: bool = True
    """Whether it takes batches of other lengths."""


def bert(size: Size, lengths: Tensor) -> Subject:
    """All of it."""
    config = transformers.BertConfig(**size._asdict(), vocab_size=1000)
    return _text(transformers.BertModel(config), lengths)


def modernbert(size: Size, lengths: Tensor) -> Subject:
    """All of it: a global layer for each two local ones."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    config = transformers.ModernBertConfig(**size._asdict(), vocab_size=1000, pad_token_id=0, **ids)
    return _text(transformers.ModernBertModel(config), lengths)


def _text(model: nn.Module, lengths: Tensor) -> Subject:
    ids = torch.randint(5, 1000, (len(lengths), int(lengths.max())))
    return Subject(model, lambda m, x, mask: m(x, attention_mask=mask.long())[0], ids)


def wav2vec2(size: Size, lengths: Tensor, positions: int = 128) -> Subject:
    """The transformer, with its convolution over so many positions, which stays padded."""
    config = transformers.Wav2Vec2Config(**size._asdict(), num_conv_pos_embeddings=positions)
    model = transformers.Wav2Vec2Model(config)
    hidden = torch.randn(len(lengths), int(lengths.max()), size.hidden_size)
    # It writes to its input.
    return Subject(model, lambda m, x, mask: m.encoder(x.clone(), attention_mask=mask)[0], hidden)


def qwen2_audio(size: Size, lengths: Tensor) -> Subject:
    """Log-mel frames padded to the length that it was built for."""
    longest = int(lengths.max())
    config = transformers.Qwen2AudioEncoderConfig(
        d_model=size.hidden_size,
        encoder_layers=size.num_hidden_layers,
        encoder_attention_heads=size.num_attention_heads,
        encoder_ffn_dim=size.intermediate_size,
        max_source_positions=longest,
    )
    model = transformers.Qwen2AudioEncoder(config)
    frames = torch.randn(len(lengths), config.num_mel_bins, 2 * longest)

    def encode(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        # As the model around it makes it.
        pairs = torch.zeros(len(mask), 1, longest, longest, device=x.device)
        pairs.masked_fill_(~mask[:, None, None], torch.finfo(x.dtype).min)
        return m(x, attention_mask=pairs)[0]

    return Subject(model, encode, frames, buckets=False)


def ast(size: Size, lengths: Tensor) -> Subject:
    """Spectrograms of one length."""
    config = transformers.ASTConfig(**size._asdict(), max_length=4 * int(lengths.max()))
    model = transformers.ASTModel(config)
    frames = torch.randn(len(lengths), config.max_length, config.num_mel_bins)
    return Subject(model, lambda m, x, _: m(x)[0], frames, buckets=False)


def vit(size: Size, lengths: Tensor) -> Subject:
    """Pictures of one size."""
    model = transformers.ViTModel(transformers.ViTConfig(**size._asdict()))
    pixels = torch.randn(len(lengths), 3, 224, 224)
    return Subject(model, lambda m, x, _: m(x)[0], pixels, buckets=False)


SUBJECTS = {
    "BERT": bert,
    "ModernBERT": modernbert,
    "Wav2Vec2, transformer": wav2vec2,
    "Wav2Vec2, blocks": partial(wav2vec2, positions=2),
    "Qwen2-Audio, encoder": qwen2_audio,
    "AST": ast,
    "ViT": vit,
}


def log_uniform(count: int, longest: int) -> Tensor:
    """int64 [count] from a fixed seed, the first of them ``longest``."""
    share = torch.rand(count, generator=torch.Generator().manual_seed(0))
    lengths = (longest * 32 ** (share - 1)).long().clamp(min=1)
    lengths[0] = longest
    return lengths


def rows_of(name: str, scale: float, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant and direction."""
    device = harness.device()
    torch.manual_seed(0)
    size = Size(768, 12, 12, 3072) if device.type == "cuda" else Size(256, 4, 4, 1024)
    lengths = log_uniform(max(int(BATCH * scale), 4), max(int(LONGEST * min(scale, 1)), 32))
    subject = SUBJECTS[name](size, lengths)
    own = subject.model.to(device).eval()
    patched = copy.deepcopy(own)
    report = slap_fast.patch(patched)
    if not report.changed("unpad"):
        why = next(change.why for change in report.changes if change.option == "unpad")
        yield {"model": name, "variant": PATCHED, "note": why}
        return
    batch = subject.batch.to(device)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    counts = [count for count in BUCKETS if subject.buckets and count <= len(lengths)]
    calls = {
        "own, padded to the longest": partial(subject.encode, own, batch, mask),
        **{f"own, {n} buckets": partial(in_buckets, subject, own, batch, mask, n) for n in counts},
        PATCHED: partial(subject.encode, patched, batch, mask),
    }
    _compare(calls, mask)
    for direction, run in {"forward": _forward, "both": _both}.items():
        variants = {variant: partial(run, call) for variant, call in calls.items()}
        taken = harness.measure(variants, device, rounds=rounds)
        for variant, figures in taken.items():
            yield {
                "model": name,
                "variant": variant,
                "direction": direction,
                **figures,
                "useful": float(mask.float().mean()),
                "times_patched": figures["ms"] / taken[PATCHED]["ms"],
            }


def in_buckets(
    subject: Subject, model: nn.Module, batch: Tensor, mask: Tensor, count: int
) -> list[Tensor]:
    """Hidden states of samples sorted by length, in ``count`` batches padded to their longest."""
    order = mask.sum(1).argsort(descending=True)
    parts = []
    for rows in order.tensor_split(count):
        longest = int(mask[rows[0]].sum())
        parts.append(subject.encode(model, batch[rows, :longest], mask[rows, :longest]))
    return parts


def _forward(call: Callable[[], Tensor | list[Tensor]], number: int) -> None:
    with torch.no_grad():
        call()


def _both(call: Callable[[], Tensor | list[Tensor]], number: int) -> None:
    out = call()
    loss = out.sum() if isinstance(out, Tensor) else torch.stack([x.sum() for x in out]).sum()
    loss.backward()


@torch.no_grad()
def _compare(calls: dict[str, Callable[[], Tensor | list[Tensor]]], mask: Tensor) -> None:
    """Raises RuntimeError unless all variants give the first one's values at real positions."""
    lengths = mask.sum(1)
    ordered = lengths[lengths.argsort(descending=True)]
    expected = None
    for name, call in calls.items():
        out = call()
        if isinstance(out, list):
            rows = [row for part in out for row in part]
            real = torch.cat([row[:n] for row, n in zip(rows, ordered.tolist(), strict=True)])
        else:
            share = out.shape[1] / mask.shape[1]  # positions that the encoder pools
            order = lengths.argsort(descending=True)
            real = torch.cat([out[i, : int(lengths[i] * share)] for i in order])
        expected = real if expected is None else expected
        error = float((real - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            raise RuntimeError(f"{name} differs from the first by {error:.2g}")


def main() -> int:
    """Runs the models and prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    scale = options.scale or 1.0
    parts = {name: partial(rows_of, name, scale, options.rounds) for name in SUBJECTS}
    harness.finish(parts, "patched encoders on padded batches", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
