"""What commands print: any text in any encoding, and how far long work is."""

import io
import json
import sys
import time

import pytest

from slap_fast import console
from slap_fast.console import Progress, emit, make_console, print_any_text


@pytest.mark.parametrize("text", ["caf\u00e9", "\u65e5\u672c", "b\udcff.wav", "\U0001f415"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_text_is_printed_in_any_encoding(text, encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_any_text()
    make_console(json=False).print(f"file: {text}")
    emit({text: 1}, json=True)
    sys.stdout.flush()
    line, answer = raw.getvalue().decode(encoding).split("\n", 1)
    assert line.startswith("file: ") and json.loads(answer) == {text: 1}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)


def test_without_a_terminal_progress_is_a_line_now_and_then(quick, capsys):
    with Progress(desc="training", total=8, unit="step", show=True) as bar:
        for _ in range(2):
            bar.update()
            bar.set_postfix_str("loss 3.1", refresh=False)
        time.sleep(0.3)  # one long step
    for _ in Progress(range(3), desc="embedding", unit="clip", show=True):
        time.sleep(0.08)
    with Progress(desc="exporting", show=True):
        time.sleep(0.12)
    lines = capsys.readouterr().err.split("\n")
    assert all("\r" not in line for line in lines)
    training = [line for line in lines if line.startswith("training: 2 of 8, 00:0")]
    assert len(training) >= 3 and all("left" in line and "loss 3.1" in line for line in training)
    assert any(line.startswith("embedding: ") and " of 3, " in line for line in lines)
    assert any(line.startswith("exporting: 00:00 gone") for line in lines)


def test_short_work_and_json_show_nothing(quick, capsys, monkeypatch):
    for _ in Progress(range(3), desc="checking", show=console.show_progress(json=True)):
        time.sleep(0.1)
    monkeypatch.setattr(console, "LINE_SECONDS", 30.0)
    for _ in Progress(range(3), desc="checking", show=console.show_progress(json=False)):
        pass
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in Progress(range(3), desc="checking", show=True):
        pass
    assert "checking: 100%" in terminal.getvalue() and "\r" in terminal.getvalue()
