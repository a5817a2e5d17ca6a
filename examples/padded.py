"""The audio tower of a CLAP loop as people write it: padded batches, plain PyTorch.

It is the same network as ``slap_fast.models.AudioTower``, parameter names included, so that
``clap_before.py`` and ``clap_after.py`` train the same model and their losses can be compared.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def log_mel(waveforms, lengths, mel):
    """[B, num_samples] -> [B, num_frames, n_mels], silence past each clip's end."""
    num_frames = (lengths - mel.win_length).clamp(min=0) // mel.hop_length + 1
    columns = -(-int(num_frames.max()) // mel.patch_time)
    needed = (columns * mel.patch_time - 1) * mel.hop_length + mel.win_length
    waveforms = F.pad(waveforms, (0, max(0, needed - waveforms.shape[1])))
    frames = waveforms.unfold(1, mel.win_length, mel.hop_length)[:, : columns * mel.patch_time]
    frames = frames - frames.mean(-1, keepdim=True)
    frames = frames - 0.97 * F.pad(frames, (1, 0))[..., :-1]
    window = torch.hann_window(mel.win_length, periodic=False)
    power = torch.fft.rfft(frames * window, mel.n_fft).abs().square()
    bands = (power @ filterbank(mel)).clamp(min=2.0**-23).log()
    real = torch.arange(frames.shape[1]) < num_frames[:, None]
    bands = torch.where(real[..., None], bands, math.log(2.0**-23))
    return (bands - mel.mean) / mel.std, num_frames


def filterbank(mel):
    """[n_fft // 2 + 1, n_mels], triangles on the mel scale."""
    hz = torch.arange(mel.n_fft // 2 + 1) * mel.sample_rate / mel.n_fft
    edges = torch.log1p(torch.tensor([mel.f_min, mel.f_max]) / 700)
    corners = torch.linspace(*edges.tolist(), mel.n_mels + 2)
    rising = (torch.log1p(hz / 700)[:, None] - corners[:-2]) / corners.diff()[:-1]
    falling = (corners[2:] - torch.log1p(hz / 700)[:, None]) / corners.diff()[1:]
    return torch.minimum(rising, falling).clamp(min=0)


def rotate(x, angles):
    """Rotary embedding of x [B, H, L, D]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(self, x, angles, mask):
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.gate_up_proj = nn.Linear(size, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x, angles, mask):
        x = x + self.attention(self.attention_norm(x), angles, mask)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    def __init__(self, config, mel):
        super().__init__()
        self.config, self.mel = config, mel
        self.patch_embedding = nn.Linear(mel.patch_dim, config.hidden_size, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, patches, real):
        """patches [B, L, patch_dim], real bool [B, L] -> [B, L, C]."""
        bands, config = self.mel.patches_per_column, self.config
        token = torch.arange(patches.shape[1])
        quarter = config.hidden_size // config.num_heads // 4
        frequencies = config.rope_theta ** -(torch.arange(quarter) / quarter)
        angles = torch.cat([(token // bands)[:, None] * frequencies,
                            (token % bands)[:, None] * frequencies], dim=-1)  # fmt: skip
        everything = real[:, None, None, :]
        near = (token[:, None] - token).abs() <= config.local_window * bands
        x = self.patch_embedding(patches)
        for i, layer in enumerate(self.layers):
            is_global = (i + 1) % config.global_every == 0
            # A padded query of a local layer must see something, or its softmax is 0 / 0.
            local = everything & near | torch.eye(len(token), dtype=torch.bool)
            x = layer(x, angles, everything if is_global else local)
        return self.norm(x)


class Mlp(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.fc1 = nn.Linear(size, 4 * size, bias=False)
        self.fc2 = nn.Linear(4 * size, size, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Head(nn.Module):
    """Attention pooling, as in SigLIP."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.probe = nn.Parameter(torch.randn(1, 1, size))
        self.attention = nn.MultiheadAttention(size, config.num_heads, bias=False, batch_first=True)
        self.layernorm = nn.RMSNorm(size, 1e-6)
        self.mlp = Mlp(size)

    def forward(self, x, real):
        probe = self.probe.expand(len(x), -1, -1)
        pooled = self.attention(probe, x, x, key_padding_mask=~real, need_weights=False)[0][:, 0]
        return pooled + self.mlp(self.layernorm(pooled))


class PaddedAudioTower(nn.Module):
    def __init__(self, config, mel):
        super().__init__()
        self.mel = mel
        self.encoder = Encoder(config, mel)
        self.head = Head(config)

    def forward(self, waveforms, lengths):
        """waveforms [B, num_samples], lengths [B] -> [B, C], unit norm."""
        mel = self.mel
        bands, num_frames = log_mel(waveforms, lengths, mel)
        patches = bands.unflatten(1, (-1, mel.patch_time)).unflatten(3, (-1, mel.patch_freq))
        patches = patches.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
        columns = -(-num_frames // mel.patch_time)
        real = torch.arange(patches.shape[1]) < (columns * mel.patches_per_column)[:, None]
        return F.normalize(self.head(self.encoder(patches, real), real), dim=-1)
