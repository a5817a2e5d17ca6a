"""The loops of examples/: equal to the trainer, on one rank and on two; five changed lines."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch

from slap_fast.config import override
from slap_fast.training.state import begin
from slap_fast.training.step import train_step
from tests.helpers import runs
from tests.helpers.paths import ROOT

EXAMPLES = ROOT / "examples"
LOOPS = {
    "pytorch_loop": "torch",
    "accelerate_loop": "accelerate",
    "fabric_loop": "lightning_fabric",
    "trainer_loop": "accelerate",
}
"""The example, and the package that it needs."""
CONFIG = override(runs.TINY, {"steps": 20, "batch_size": 8, "warmup_steps": 5})


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def our_losses():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import slap_parts

        data = slap_parts.make_steps(CONFIG)
        state, _ = begin(CONFIG, None, None, runs.CPU)
        losses = []
        for state.step in range(CONFIG.steps):
            losses.append(float(train_step(state, data[state.step].batches)["loss"]))
        return losses


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_has_the_losses_of_the_trainer(name, our_losses):
    pytest.importorskip(LOOPS[name])
    loop = __import__(name)
    result = loop.train(CONFIG)
    losses = result.losses if name == "trainer_loop" else [loss for loss, _ in result]
    assert losses == pytest.approx(our_losses, rel=1e-5)


RANK = """
import hashlib, json, os
from pathlib import Path
import torch.distributed as dist
from {name} import train
from tests.repo.test_examples import CONFIG

if "{name}" == "pytorch_loop":
    dist.init_process_group()
if "{name}" == "trainer_loop":
    trainer = train(CONFIG)
    losses, model = trainer.losses, trainer.model.slap
else:
    *_, (_, model) = rows = list(train(CONFIG))
    losses = [loss for loss, _ in rows]
digest = hashlib.sha256()
for x in model.state_dict().values():
    digest.update(x.contiguous().numpy().tobytes())
Path(__file__).with_name(os.environ["RANK"]).write_text(json.dumps([losses, digest.hexdigest()]))
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_two_ranks_see_other_clips_and_end_with_one_model(name, tmp_path):
    pytest.importorskip(LOOPS[name])
    program = tmp_path / "rank.py"
    paths = [str(path) for path in (ROOT, EXAMPLES)]
    program.write_text(f"import sys\nsys.path[:0] = {paths}\n{RANK.format(name=name)}")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (losses, model), (others, other_model) = (
        json.loads((tmp_path / rank).read_text()) for rank in "01"
    )
    assert len(losses) == len(others) == 20 and losses != others
    assert model == other_model


def code(name):
    """The lines of an example behind its docstring."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    return Counter(text.split('"""', 2)[2].splitlines())


def test_five_changed_lines_speed_up_a_clap_loop():
    before, after = code("clap_before"), code("clap_after")
    assert (before - after).total() <= (after - before).total() == 5


def test_the_two_clap_loops_train_the_same_model(monkeypatch):
    import clap_after
    import clap_before
    from sounds import captioned_sounds

    def same_start(*settings):
        weights = clap_after.AudioTower(*settings).state_dict()
        tower = padded_tower(*settings)
        tower.load_state_dict(weights)
        return tower

    padded_tower = clap_before.PaddedAudioTower
    monkeypatch.setattr(clap_before, "PaddedAudioTower", same_start)
    clips = captioned_sounds(12, max_seconds=2.0)
    losses, expected = (list(loop.train(clips, 4)) for loop in (clap_after, clap_before))
    assert torch.tensor(losses).isfinite().all() and len(losses) == 3
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_clap_is_compared_with_its_own_code(tmp_path, capsys):
    import numpy as np
    import soundfile
    from compare_clap import compare

    from tests.helpers.public_models import save_clap

    folder = tmp_path / "ESC-50"
    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()
    rng = np.random.default_rng(0)
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for i, category in enumerate(["dog", "rain", "church_bells"] * 2):
        soundfile.write(folder / "audio" / f"{i}.wav", 0.1 * rng.standard_normal(44_100), 44_100)
        lines.append(f"{i}.wav,1,0,{category},False,1,A")
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines))
    ours, own = compare(folder, str(save_clap(tmp_path / "clap"))).values()
    assert ours == own
    assert capsys.readouterr().out.count("100.00%") == 2  # the same answers
