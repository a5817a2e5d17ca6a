"""The suite notices planted bugs: a test that cannot fail guards nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers import mutants
from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter shows them; forks need it")
def test_planted_bugs_are_noticed(figure, tmp_path):
    count = len(mutants.MUTANTS)
    assert count >= 20
    command = [sys.executable, "-m", "tests.helpers.mutants", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    unharmed, *codes = json.loads(done.stdout)
    assert unharmed == 0, (tmp_path / "output.txt").read_text()[-3000:]
    for number in figure("K11", ci=count, soak=count):
        # 1: a test failed; below 0: the bug reads memory that is not there, and a signal ends it.
        assert codes[number] == 1 or codes[number] < 0, mutants.MUTANTS[number]
