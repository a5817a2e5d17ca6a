"""A CLAP checkpoint on ESC-50 three ways: through slap_fast.load, transformers and laion_clap.

    python examples/compare_clap.py ESC-50 --model laion/clap-htsat-unfused --laion-id 1

ESC-50 is the folder that github.com/karolpiczak/ESC-50 gives. Every way has the prompt of
laion_clap's experiment_scripts/esc50_api.py. ``--laion-id`` is load_ckpt's number of the same
weights there (1: 630k-audioset-best, 3: its fused one) and needs ``pip install laion-clap``.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import slap_fast
from slap_fast.data.audio.decode import decode

PROMPT = "This is a sound of {}"
RATE = 48_000


def read_esc50(folder):
    """Files, the class of each as a number, and the names of the classes."""
    with (folder / "meta" / "esc50.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = sorted({row["category"] for row in rows})
    files = [folder / "audio" / row["filename"] for row in rows]
    targets = np.array([names.index(row["category"]) for row in rows])
    return files, targets, [name.replace("_", " ") for name in names]


def through_slap_fast(name, files, labels):
    """Cosines [N, L]."""
    model = slap_fast.load(name, device="cuda" if torch.cuda.is_available() else "cpu")
    vectors = model.embed_audio(files, progress=True)
    return model.similarity(vectors, model.label_vectors(labels, PROMPT))


@torch.inference_mode()
def through_transformers(name, files, labels):
    """Cosines [N, L] of its own model and processor, one file at a time."""
    from transformers import AutoProcessor, ClapModel

    model, processor = ClapModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    prompts = [PROMPT.format(label) for label in labels]
    rows = []
    for file in files:
        waveform = decode(file, sample_rate=RATE).waveform
        inputs = processor(
            text=prompts, audio=waveform, sampling_rate=RATE, return_tensors="pt", padding=True
        )
        output = model(**inputs)
        rows.append(output.audio_embeds[0] @ output.text_embeds.T)
    return torch.stack(rows).numpy()


def through_laion(number, files, labels):
    """Cosines [N, L] of LAION's package, one file at a time."""
    import laion_clap

    fused = number in (2, 3)
    model = laion_clap.CLAP_Module(enable_fusion=fused, device="cpu")
    model.load_ckpt(model_id=number)
    text = model.get_text_embedding([PROMPT.format(label) for label in labels])
    audio = [model.get_audio_embedding_from_filelist([str(file)])[0] for file in files]
    return np.stack(audio) @ text.T


def compare(folder, name, laion_id=None):
    """{way: accuracy}, and prints a table of them."""
    files, targets, labels = read_esc50(folder)
    ways = {
        "slap_fast.load": lambda: through_slap_fast(name, files, labels),
        "transformers": lambda: through_transformers(name, files, labels),
    }
    if laion_id is not None:
        ways["laion_clap"] = lambda: through_laion(laion_id, files, labels)
    table = Table(
        "way", "accuracy", "same answer as slap_fast", title=f"{name}, {len(files)} clips"
    )
    predictions = {way: scores().argmax(1) for way, scores in ways.items()}
    accuracies = {way: float((answer == targets).mean()) for way, answer in predictions.items()}
    for way, accuracy in accuracies.items():
        same = (predictions[way] == predictions["slap_fast.load"]).mean()
        table.add_row(way, f"{accuracy:.2%}", f"{same:.2%}")
    Console().print(table)
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("esc50", type=Path)
    parser.add_argument("--model", default="laion/clap-htsat-unfused")
    parser.add_argument("--laion-id", type=int, default=None)
    options = parser.parse_args()
    compare(options.esc50, options.model, options.laion_id)
