"""``slap-fast export`` (ONNX, torch.export) and ``export-weights`` (a model folder)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from slap_fast.cli.options import ModelFolder
from slap_fast.console import emit, make_console


def export(model: ModelFolder, out: Path = Path("slap.onnx"), json: bool = False) -> int:
    """Write a model's audio tower as an ONNX file or a torch.export program.

    It takes a waveform of any length and gives its embedding, as the model does: that is checked
    before it is written.

    Example: slap-fast export --model runs/my/best --out slap.onnx

    Args:
        out: The file to write; its name ends in .onnx or .pt2.
        json: Print what was written as JSON on stdout.
    """
    from slap_fast.checkpoint.model import read_model
    from slap_fast.interop import export

    slap, _, _ = read_model(model)
    difference = export.export(slap.eval(), out)
    rate, size = slap.config.mel.sample_rate, slap.config.embed_dim or slap.config.audio.hidden_size
    make_console(json).print(
        f"{out}: waveform [num_samples] float32 at {rate} Hz -> embedding [{size}], at most "
        f"{difference:.1e} from the model's"
    )
    emit({"out": str(out), "sample_rate": rate, "embed_dim": size, "difference": difference}, json)
    return 0


def export_weights(
    model: Path, out: Path, weights: Literal["student", "teacher"] = "student"
) -> int:
    """Write the student or the teacher of a run's checkpoint as a model folder of its own.

    The teacher is the moving average of the audio encoder; all else is the student's.

    Example: slap-fast export-weights --model runs/my/last --out my-model --weights teacher

    Args:
        model: A run's checkpoint, such as runs/my/last.
        out: The model folder to write.
        weights: Which of the two.
    """
    from slap_fast.checkpoint import weights as checkpoint_weights

    checkpoint_weights.export_weights(model, out, weights)
    make_console(json=False).print(f"model: {out}")
    return 0
