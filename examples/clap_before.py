"""A CLAP training loop in plain PyTorch, with padded batches: python examples/clap_before.py

``clap_after.py`` is this loop on slap-fast: five lines differ.
"""

import torch
import torch.nn.functional as F
from padded import PaddedAudioTower
from sounds import captioned_sounds
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import ModernBertConfig, ModernBertModel

from slap_fast.config import AudioEncoderConfig, MelConfig

AUDIO = AudioEncoderConfig(hidden_size=192, num_layers=6, num_heads=3, intermediate_size=512)
TEXT = ModernBertConfig(
    vocab_size=2048, hidden_size=192, num_hidden_layers=4, num_attention_heads=3,
    intermediate_size=288, pad_token_id=0, cls_token_id=2, sep_token_id=3,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def collate(items):
    waveforms, captions = zip(*items, strict=True)
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    audio = pad_sequence(waveforms, batch_first=True)
    ids = pad_sequence(captions, batch_first=True)
    return audio, lengths, ids, (ids != 0).long()


def train(clips, batch_size=16):
    """Yields the loss of each step."""
    torch.manual_seed(0)
    text_tower = ModernBertModel(TEXT)
    audio_tower = PaddedAudioTower(AUDIO, MelConfig())
    log_scale = nn.Parameter(torch.tensor(2.66))
    parameters = [*audio_tower.parameters(), *text_tower.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    for audio, lengths, ids, mask in DataLoader(clips, batch_size, collate_fn=collate):
        audio_features = audio_tower(audio, lengths)
        words = text_tower(input_ids=ids, attention_mask=mask).last_hidden_state
        text_features = F.normalize((words * mask[..., None]).sum(1), dim=-1)
        logits = log_scale.exp() * audio_features @ text_features.T
        targets = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    for step, loss in enumerate(train(captioned_sounds(320))):
        print(f"step {step}  loss {loss:.4f}")
