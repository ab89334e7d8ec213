"""How a run shows itself on the terminal."""

from __future__ import annotations

import pytest

from reducio_latents.train.progress import move_bar, open_bar


def test_a_bar_that_never_moved_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with open_bar("probe", "video", shown=True):
        pass
    assert capsys.readouterr().err == ""
    with open_bar("probe", "video", shown=True) as bar:
        move_bar(bar, 3, 4)
    assert "3/4" in capsys.readouterr().err
