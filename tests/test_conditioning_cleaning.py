"""Captions cleaned as PixArt-style models expect: what the published extraction gives for each."""

# ruff: noqa: RUF001 (characters that look like others are what is tested)
from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents.conditioning.cleaning import REVISIONS, clean_pixart, get_cleaning
from reducio_latents.errors import ConfigError

PUBLISHED = [
    ("A Red Fox runs, through SNOW.", "a red fox runs, through snow."),
    ("Free download: IMG_2031.JPG 1920x1080 at www.photos.com/cat", "at"),
    ("<b>Bold</b> &amp; bright &lt;i&gt;", "bold bright"),
    ("this-is-my-cute-cat walking_home", "this is my cute cat walking home"),
    ('***SALE*** """NOW""" (50%) #12345 [new]', 'sale "now" 50% new'),
    ("a+cat%20on+a+mat", "a cat on a mat"),
    ("<person> at 19:30 near 10.0.0.1", "person at 19:30 near"),
    ("user@mail.com wrote 1234567 words", "user wrote words"),
    ("日本 tokyo – “neon” ‘night’…", "tokyo - \"neon\" 'night'…"),
    ("ﬁre ｆｕｌｌ １２", "fire full 12"),
    ("worldwide free shipping, click for details page 12", ""),
    ("serial ab1234 a1b2c3 12ab34 jc6640vc231", "serial"),
    ("'quoted caption'", "quoted caption"),
    ("first,second/third.fourth", "first, second third. fourth"),
    ("<script>alert(1)</script> visible <!-- not --> text", "visible text"),
    ("wait ... what : ; yes", "wait what: ; yes"),
    ("&quot;hi&quot; &foo; &copy;", '"hi" foo'),
    (".hidden", ""),
    ("", ""),
    ("www:// x", "x"),
    ("donâ€™t", "don†t"),  # lower case comes first, so ftfy cannot undo it; the next it can
    ("fine \xe2\x80\x93 and mild", "fine - and mild"),
    ("<![CDATA[seen]]> text", "seen text"),
    ("<![n00b no markup", "<! no markup"),
    ("half \ud83d of a pair", "half ? of a pair"),
]


@pytest.mark.parametrize(("caption", "cleaned"), PUBLISHED)
def test_a_caption_is_cleaned_as_published(caption: str, cleaned: str) -> None:
    assert clean_pixart(caption) == cleaned


def test_without_its_packages_cleaning_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ConfigError, match=r"needs ftfy.*pip install 'reducio-latents\[models\]'"):
        clean_pixart("a cat")


@given(st.text(st.characters(), max_size=200))
def test_any_text_comes_out_trimmed_and_on_one_line(caption: str) -> None:
    cleaned = clean_pixart(caption)
    assert cleaned == cleaned.strip()
    assert "\n" not in cleaned


def test_a_caption_of_ten_thousand_characters_is_cleaned() -> None:
    assert clean_pixart("cat " * 2500) == ("cat " * 2500).strip()
    assert clean_pixart("9" * 10_000) == ""
    assert clean_pixart("<b>cat</b> " * 900) == ("cat " * 900).strip()


def test_none_changes_nothing_and_another_name_is_refused() -> None:
    assert get_cleaning("none")("  A <b>Cat</b> ") == "  A <b>Cat</b> "
    with pytest.raises(ConfigError, match="choose one of none, whitespace, pixart"):
        get_cleaning("deepfloyd")


def test_a_cleaning_that_gives_other_words_than_it_once_did_has_another_fingerprint() -> None:
    # Rules written by hand made "doesnâ€ t" of this.
    assert get_cleaning("pixart")("it doesnâ€™t") == "it doesn†t"
    assert REVISIONS["pixart"] != "pixart"
