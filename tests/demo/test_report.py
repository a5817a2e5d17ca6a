"""The report page: it shows its inputs, is safe to open, and embeds the clips."""

import base64
import io
import re
import wave

import numpy as np
import pytest

from slap_fast.demo.content import Promise, ReportClip, ReportQuery
from slap_fast.demo.media import MAX_COLUMNS
from slap_fast.demo.report import write_report

SECTIONS = ["figures", "search", "clips", "curves", "checks", "facts", "next"]
CARD = {
    "retrieval": {
        "t2a": {"R@1": 0.512, "R@10": 0.943},
        "a2t": {"R@1": 0.587, "R@10": 0.961},
        "chance": {"t2a": {"R@1": 0.003, "R@10": 0.025}, "a2t": {"R@1": 0.004, "R@10": 0.026}},
        "queries": 1587,
    },
    "zero_shot": {
        "accuracy": 0.956,
        "balanced_accuracy": 0.951,
        "chance": 0.0625,
        "majority": 0.104,
        "labels": ["a bell", "a drum"],
    },
    "caption": {"CIDEr-D": 3.417, "CIDEr-D_shuffled": 0.562},
    "n": 390,
    "n_expected": 400,
}
HISTORY = [
    {"step": step, "loss": 9.0 - step, "contrastive": 4.0 - step, "ssl": 5.0, "caption": 2.0}
    for step in range(1, 4)
]
PROMISES = [Promise("recall", 0.512, 0.4, True, True), Promise("alarms", 3.0, 1.0, False, False)]
FACTS = {"trained for": "188 s", "torch": "2.13.0"}


def clip(seconds: float = 0.2, seed: int = 0, **changes) -> ReportClip:
    rng = np.random.default_rng(seed)
    num_samples = round(16_000 * seconds)
    values = dict(
        name="test/0",
        waveform=rng.uniform(-1, 1, num_samples).astype(np.float32),
        sample_rate=16_000,
        log_mel=rng.normal(size=(num_samples // 160, 64)).astype(np.float32),
        captions=("a slow bell", "a bell rings slowly"),
        generated="A bell rings quickly.",
        labels=[("a bell", 0.8), ("a drum", 0.2)],
        label="a bell",
    )
    return ReportClip(**(values | changes))


@pytest.fixture
def render(tmp_path):
    """The page with the defaults above, any of them changed."""

    def write(**changes) -> str:
        clips = [clip(), clip(seed=1, captions=("a loud drum",), label=None)]
        queries = [ReportQuery("ringing", [(0, 0.8, True), (1, 0.1, False)])]
        values = dict(card=CARD, history=HISTORY, promises=PROMISES, clips=clips, queries=queries)
        write_report(tmp_path / "report.html", **(values | {"facts": FACTS} | changes))
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def block(page: str, name: str) -> tuple[bytes, dict[str, int]]:
    """A data block of the page, and its data- attributes."""
    attributes, content = re.search(f'<script [^>]*id="{name}"([^>]*)>([^<]*)<', page).groups()
    sizes = {key: int(value) for key, value in re.findall(r'data-(\w+)="(\d+)"', attributes)}
    return base64.b64decode(content, validate=True), sizes


def picture(page: str, index: int) -> np.ndarray:
    levels, size = block(page, f"mel-{index}")
    return np.frombuffer(levels, np.uint8).reshape(size["height"], size["width"])


def test_every_section_exists(render):
    page = render()
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    for text in ("a slow bell", "a bell rings slowly", "&#10003; the one described", "188 s"):
        assert text in page
    assert "slap-fast train --data my/manifest.csv --out runs/my" in page


@pytest.mark.parametrize(
    "value, chance",
    [
        ("51.2<small>%</small>", "0.3%"),
        ("58.7<small>%</small>", "0.4%"),
        ("95.6<small>%</small>", "6.2%"),
        ("3.42", "0.56"),
    ],
    ids=["text to audio", "audio to text", "zero-shot", "captions"],
)
def test_figures_are_shown_beside_their_chance_level(render, value, chance):
    assert re.search(f'class="big">{re.escape(value)}<span>[^<]*<br>{chance}</span>', render())


def test_what_was_not_evaluated_is_left_out(render):
    assert render().count('class="tile"') == 4
    assert render(card={**CARD, "zero_shot": None, "caption": None}).count('class="tile"') == 2


HOSTILE = "<script>alert('{}')</script>&\""
ESCAPED = "&lt;script&gt;alert(&#x27;{}&#x27;)&lt;/script&gt;&amp;&quot;"


@pytest.mark.parametrize(
    "field",
    ["caption", "wording", "generated", "guess", "truth", "query", "check", "fact", "value"],
)
def test_text_is_escaped(render, field):
    def text(name: str) -> str:
        return HOSTILE.format(name)

    hostile = clip(
        captions=(text("caption"), text("wording")),
        generated=text("generated"),
        labels=[(text("guess"), 1.0)],
        label=text("truth"),
    )
    page = render(
        clips=[hostile],
        queries=[ReportQuery(text("query"), [(0, 0.5, False)])],
        promises=[Promise(text("check"), 1.0, 0.0, True, True)],
        facts={text("fact"): text("value")},
    )
    assert ESCAPED.format(field) in page
    assert f"alert('{field}')" not in page


def test_page_fetches_nothing(render):
    page = render()
    assert set(re.findall(r'\b(?:src|href)="([^"]*)"', page)) == {"#checks"}
    assert not re.search(r"https?:|@import|url\(", page)


def test_audio_is_the_waveform(render):
    exact = np.array([0, 1, -1, 0.5, 1.5, -1.5, 1 / 32767], dtype=np.float32)
    sounds = [exact, clip().waveform]
    page = render(clips=[clip(waveform=sound, sample_rate=22_050) for sound in sounds], queries=[])
    for index, sound in enumerate(sounds):
        with wave.open(io.BytesIO(block(page, f"wav-{index}")[0])) as file:
            assert file.getparams()[:4] == (1, 2, 22_050, len(sound))
            samples = np.frombuffer(file.readframes(len(sound)), "<i2")
        # Half a step, and the float32 rounding of a product of up to 2^15.
        assert np.abs(samples - 32767 * np.clip(sound, -1, 1).astype(float)).max() <= 0.5 + 2**-9


def test_picture_has_time_to_the_right_and_pitch_upwards(render):
    log_mel = np.zeros((50, 64), dtype=np.float32)
    log_mel[30:, 10] = 3.0
    levels = picture(render(clips=[clip(log_mel=log_mel)], queries=[]), 0)
    expected = np.zeros((64, 50), dtype=np.uint8)
    expected[-1 - 10, 30:] = 255
    np.testing.assert_array_equal(levels, expected)


def test_picture_of_a_long_clip_is_narrow_and_keeps_a_click(render):
    log_mel = np.random.default_rng(0).uniform(0, 1, (3000, 64)).astype(np.float32)
    log_mel[2000] = 30.0
    levels = picture(render(clips=[clip(log_mel=log_mel)], queries=[]), 0)
    height, width = levels.shape
    assert height == 64 and MAX_COLUMNS / 2 < width <= MAX_COLUMNS
    bright = np.flatnonzero((levels == 255).all(0))
    assert len(bright) == 1 and abs((bright[0] + 0.5) / width - 2000.5 / 3000) < 1 / width


def test_silence_is_black(render):
    log_mel = np.full((20, 64), -2.5, dtype=np.float32)
    with np.errstate(all="raise"):
        page = render(clips=[clip(log_mel=log_mel)], queries=[])
    assert not picture(page, 0).any()


def test_palette_grows_lighter(render):
    palette = np.frombuffer(block(render(), "palette")[0], np.uint8).reshape(256, 3) / 255
    linear = np.where(palette <= 0.04045, palette / 12.92, ((palette + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > 0).mean() > 0.98 and np.diff(luminance).min() > -1e-3
    assert luminance[0] < 0.001 and luminance[-1] > 0.9


def test_words_unknown_to_the_captions_are_marked(render):
    page = render(clips=[clip()], queries=[])
    assert "A bell rings <mark>quickly.</mark>" in page


@pytest.mark.parametrize(
    "label, note, ticks",
    [("a drum", "", 1), (None, "no single label is right", 0), ("a cat", "truly a cat", 0)],
    ids=["listed", "none", "not listed"],
)
def test_true_label_is_shown(render, label, note, ticks):
    page = render(clips=[clip(label=label)], queries=[])
    assert f'Zero-shot labels <span class="note">{note}</span>' in page
    assert page.count("a drum &#10003;") == ticks


def test_missed_promises_are_shown(render):
    page = render()
    assert 'class="bad" href="#checks">1 of 2 checks passed' in page
    rows = re.findall(r"<tr><th>(\w+)</th><td>(.*?)</td><td>(.*?)</td>.*?; (\w+)</span>", page)
    assert rows == [
        ("recall", "0.512", "at least 0.4", "passed"),
        ("alarms", "3", "below 1", "missed"),
    ]


@pytest.mark.parametrize("rank", [0, 2, 3, None], ids=["first", "third", "fourth", "not found"])
def test_query_shows_whether_the_right_clip_was_found(render, rank):
    results = [(i, 0.9 - 0.1 * i, i == rank) for i in range(4)]
    page = render(clips=[clip(0.05)] * 4, queries=[ReportQuery("ringing", results)])
    shown = rank is not None and rank < 3
    assert page.count("&#10003; the one described") == shown
    assert page.count("the one described is not among them") == (not shown)
    assert re.findall(r">cosine ([^<]+)<", page) == ["0.90", "0.80", "0.70"]


def curve(page: str, title: str) -> tuple[str, dict[float, float]]:
    """Path of a panel, and the height on the page of each tick of its vertical axis."""
    panel = re.search(f"<h3>{title}</h3>.*?</figure>", page, re.DOTALL).group()
    ticks = re.findall(r'y1="([\d.]+)"[^>]*/><text[^>]*>([^<]+)<', panel)
    return re.search(r'<path d="([^"]*)"', panel).group(1), {float(v): float(y) for y, v in ticks}


def test_curve_passes_through_its_values(render):
    history = [{"step": 10 * i, "loss": value} for i, value in enumerate((14.0, 12.0, 11.0, 10.0))]
    path, heights = curve(render(history=history), "Total loss")
    points = np.array([point.split() for point in path[1:].split("L")], dtype=float)
    np.testing.assert_allclose(points[:, 1], [heights[v] for v in (14, 12, 11, 10)], atol=0.051)
    np.testing.assert_allclose(np.diff(points[:, 0], 2), 0, atol=0.21)
    assert points[0, 1] < points[-1, 1] and points[0, 0] < points[-1, 0]


@pytest.mark.parametrize(
    "values", [(7.0,), (0.0, 0.0), (0.0, 9.0), (-1.5, 3.9), (1e-4, 3e5)], ids=str
)
def test_axis_encloses_any_values(render, values):
    history = [{"step": i + 1, "loss": value} for i, value in enumerate(values)]
    _, heights = curve(render(history=history), "Total loss")
    assert min(heights) <= min(values) and max(values) <= max(heights)
    assert 2 <= len(heights) <= 7


def test_curve_has_a_gap_where_a_value_is_missing(render):
    values = (4.0, 3.0, None, float("nan"), 2.0, 1.0)
    history = [{"step": i + 1, "ssl": v} for i, v in enumerate(values) if v is not None]
    history.insert(2, {"step": 3})
    page = render(history=history)
    path, _ = curve(page, "Self-distillation loss")
    assert [len(piece.split("L")) for piece in path[1:].split("M")] == [2, 2]
    assert page.count("<svg") == 1


def test_nothing_to_show_is_no_section(render):
    page = render(history=[], clips=[], queries=[])
    assert re.findall(r'<section id="(\w+)"', page) == ["figures", "checks", "facts", "next"]


def test_a_clip_is_embedded_once(render):
    clips = [clip(2.0, seed) for seed in range(3)]
    queries = [ReportQuery("ringing", [(0, 0.9, True), (1, 0.5, False), (2, 0.1, False)])] * 4
    size = len(render(clips=clips, queries=queries).encode())
    content = sum(2 * len(one.waveform) + one.log_mel.size for one in clips)
    assert size < 4 / 3 * content + 50_000
