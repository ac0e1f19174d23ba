"""The page: valid HTML in one file, set as a text is."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ddpm.evaluation import report
from tests.page import Page, check


@pytest.mark.parametrize(
    ("plain", "found"),
    [
        ("L_T", "<i>L</i><sub>T</sub>"),
        ("L_{t-1}, bits/dim", "<i>L</i><sub>t−1</sub>, bits/dim"),
        ("x_0 as from x_t.", "<i>x</i><sub>0</sub> as from <i>x</i><sub>t</sub>."),
        ("L <= 3", "L ≤ 3"),
        ("1.3e-09 and 1e+10", "1.3\xa0×\xa010<sup>−9</sup> and 1\xa0×\xa010<sup>10</sup>"),
        ("-0.04 ± 1", "−0.04 ± 1"),
        ("8x8x1", "8×8×1"),
        ("distance ↓", "distance\xa0↓"),
        # Names of the config, dates and digests are as they are.
        ("fixed_large 2026-11-28 9e04a_7", "fixed_large 2026-11-28 9e04a_7"),
        ("<b> & 'x'", "&lt;b&gt; &amp; &#x27;x&#x27;"),
    ],
)  # fmt: skip
def test_words_are_set_as_in_print(plain, found):
    assert report.typeset(plain) == found


def test_long_words_do_not_widen_a_narrow_page():
    """Such as a digest of weights: on a telephone the whole page would scroll sideways."""
    style = report.page("run", "", []).split("</style>")[0]
    assert re.search(r"^p \{[^}]*overflow-wrap: anywhere", style, re.MULTILINE)


def test_page_is_valid_whatever_the_names():
    pixels = np.zeros((5, 4, 6, 3), np.uint8)
    fragments = [
        report.text("a < b & c"),
        report.table(("L_T <", "value"), [("   floor", "-1.5e-3"), ("x", 3.0)]),
        report.settings("<key>", {"a.eta": 0.0, "a.path": "<a> & \"b\" 'c'"}, ["a.path"]),
        report.folded("more & more", report.text("within")),
        report.pair(report.images(pixels, 'x_0 "quoted" <i>'), report.plot(report.axes()[0], "t")),
    ]  # fmt: skip
    page = check(report.page("<run> & 'name'", "<about>", [("A & B", fragments), ("C", [])]))
    assert page.headings == ["A & B", "C"]
    assert "<run> & 'name'" in page.words
    assert "'<a> & \"b\" \\'c\\''" in page.words
    assert page.alts[0] == 'x0 "quoted" <i>'
    text = report.table(("a", "b"), [("   floor", -1.5)])
    assert '<td class="part">floor</td><td class="number">−1.5</td>' in text


def test_small_images_are_shown_large():
    """8x8 pixels in a grid of four fill most of a screen, each still one square."""
    pixels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1)
    (source,) = Page(report.images(pixels, "four")).sources
    picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert min(picture.size) >= 800
    assert len(np.unique(np.asarray(picture))) == 256
