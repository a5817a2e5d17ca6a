"""Caption generation: greedy and beam search with a key-value cache, all clips in lockstep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slap_fast import ops
from slap_fast.models.caption_decoder import CaptionDecoder
from slap_fast.models.layers import Segments
from slap_fast.reference.rope import rotate


class DecodingState:
    """Cross-attention keys and values of B clips, and a cache that grows by one token a step."""

    def __init__(self, decoder: CaptionDecoder, audio_features: Tensor, context: Segments) -> None:
        layers = decoder.layers
        self.keys_values = [layer.cross_attention.keys_values(audio_features) for layer in layers]
        self.context, self.length = context, 0
        self._cache: list[Tensor | None] = [None] * len(layers)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v [N, H, D] and returns all so far, [2, N, H, t, D]."""
        past, new = self._cache[layer], torch.stack([k, v])[..., None, :]
        self._cache[layer] = new if past is None else torch.cat([past, new], dim=-2)
        return self._cache[layer]

    def reorder(self, hypotheses: Tensor) -> None:
        """Keeps the hypotheses of these indices, int64 [N], as beam search picks them."""
        self._cache = [keys_values[:, hypotheses] for keys_values in self._cache]


@torch.no_grad()
def decode_step(decoder: CaptionDecoder, ids: Tensor, state: DecodingState) -> Tensor:
    """ids int64 [B, K], the last token of K hypotheses of each of B clips -> log-probabilities of
    the next one, fp32 [B, K, V]; ``state`` is advanced in place."""
    (clips, width), device = ids.shape, ids.device
    position = torch.full((1, 1), state.length, dtype=torch.int32, device=device)
    rope = ops.rope_tables(position, decoder.head_dim, decoder.config.rope_theta)
    # The K hypotheses of a clip are K queries to the same keys.
    segments = Segments(torch.arange(clips + 1, dtype=torch.int32, device=device) * width, width)
    x = decoder.token_embedding(ids.flatten())
    for i, (layer, keys_values) in enumerate(zip(decoder.layers, state.keys_values, strict=True)):
        attention = layer.attention
        qkv = attention.qkv_proj(layer.attention_norm(x))
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        k, v = state.extend(i, rotate(k, rope), v)
        out = F.scaled_dot_product_attention(rotate(q, rope)[:, :, None], k, v)[:, :, 0]
        x = x + attention.out_proj(out.flatten(1))
        x = x + layer.cross_attention(layer.cross_norm(x), segments, keys_values, state.context)
        x = x + layer.mlp(layer.mlp_norm(x))
    state.length += 1
    logits = decoder.norm(x) @ decoder.token_embedding.weight.T
    return logits.float().log_softmax(-1).unflatten(0, (clips, width))


@torch.no_grad()
def generate(
    decoder: CaptionDecoder,
    audio_features: Tensor,
    context: Segments,
    *,
    start_id: int,
    end_id: int,
    max_tokens: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Captions of B clips by beam search (greedy with one beam), all clips in lockstep.

    Args:
        audio_features: dense features [Tk, context_size].
        context: the clips' segments.
        start_id: the token every caption begins with.
        end_id: the token that ends one.
        max_tokens: most tokens after the start.
        num_beams: hypotheses kept per clip.
        length_penalty: finished hypotheses rank by log-probability / length ** length_penalty.

    Returns:
        B lists of token ids, without start and end.
    """
    clips, device = len(context.cu_seqlens) - 1, audio_features.device
    state = DecodingState(decoder, audio_features, context)
    ids = torch.full((clips, 1), start_id, device=device)
    scores, lengths = torch.zeros(2, clips, 1, device=device)
    done = torch.zeros_like(ids, dtype=torch.bool)
    history = ids.new_empty(clips, 1, 0)
    clip = torch.arange(clips, device=device)[:, None]
    # A finished hypothesis repeats its end token, at no cost.
    vocab = decoder.token_embedding.num_embeddings
    only_end = torch.full((vocab,), -torch.inf, device=device)
    only_end[end_id] = 0.0
    for _ in range(max_tokens):
        log_probs = torch.where(done[..., None], only_end, decode_step(decoder, ids, state))
        total, steps = scores[..., None] + log_probs, lengths + ~done
        ranked = (total / steps[..., None] ** length_penalty).flatten(1)
        best = ranked.topk(min(num_beams, ranked.shape[1])).indices
        parent, ids = best // vocab, best % vocab
        scores, lengths = total.flatten(1).gather(1, best), steps.gather(1, parent)
        done = done.gather(1, parent) | (ids == end_id)
        history = torch.cat([history[clip, parent], ids[..., None]], dim=2)
        state.reorder((clip * total.shape[1] + parent).flatten())
        if done.all():
            break
    best = (scores / lengths**length_penalty).argmax(1)
    chosen = history[clip[:, 0], best].tolist()
    return [ids[: ids.index(end_id)] if end_id in ids else ids for ids in chosen]
