"""The suite catches planted bugs: a test that cannot fail guards nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
import torch

from tests.helpers import mutants
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.path}: {m.test}")
def test_the_text_and_the_test_of_a_mutant_exist(mutant):
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1 and mutant.new != mutant.old
    path, *names = mutant.test.partition("[")[0].split("::")
    body = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8")).body
    for name in names:
        defined = {node.name: node for node in body if hasattr(node, "name")}
        assert name in defined, mutant.test
        body = defined[name].body


@pytest.mark.slow(minutes=1.5)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter shows them; forks need it")
def test_planted_bugs_are_caught(figure, tmp_path):
    count = len(mutants.MUTANTS)
    assert count >= 20
    command = [sys.executable, "-m", "tests.helpers.mutants", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    unchanged, *codes = json.loads(done.stdout)
    assert unchanged == 0, (tmp_path / "output.txt").read_text()[-3000:]
    for number in figure("K11", ci=count, soak=count):
        # 1: a test failed; below 0: an invalid memory access of the bug ended pytest by a signal.
        assert codes[number] == 1 or codes[number] < 0, mutants.MUTANTS[number]
