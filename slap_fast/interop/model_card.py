"""The README.md of a model folder, as model hubs read it."""

from __future__ import annotations

from typing import Any

from slap_fast.config import ModelConfig

_HEAD = """---
license: apache-2.0
pipeline_tag: zero-shot-audio-classification
tags: [audio, clap, slap, slap-fast, language-audio-pretraining]
---

# SLAP, trained with slap-fast

A language-audio model (SLAP, arXiv 2601.12594) for clips of any length at {mel.sample_rate} Hz:
{audio.num_layers} audio layers of width {audio.hidden_size}, embeddings of width {dim}.

```python
import slap_fast.interop.transformers  # registers the classes
from transformers import pipeline

classify = pipeline("zero-shot-audio-classification", model="THIS FOLDER OR ITS HUB ID")
print(classify("a.wav", candidate_labels=["a dog barks", "rain"]))
```

## Evaluation

"""


def model_card(config: ModelConfig, card: dict[str, Any]) -> str:
    """Markdown with the hub's YAML head; ``card`` is that of ``slap-fast eval``, or empty."""
    audio = config.audio
    head = _HEAD.format(mel=config.mel, audio=audio, dim=config.embed_dim or audio.hidden_size)
    figures = list(_figures(card))
    if not figures:
        return head + "not run\n"
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures)
    coverage = f"{card['n']} of {card['n_expected']} clips evaluated.\n" if "n" in card else ""
    return f"{head}| figure | value |\n|---|---|\n{table}\n\n{coverage}"


def _figures(card: dict[str, Any], path: str = "") -> Any:
    """Yields every number of a card with its dotted name."""
    for key, value in card.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{path}{key}.")
        elif isinstance(value, float):
            yield f"{path}{key}", value
