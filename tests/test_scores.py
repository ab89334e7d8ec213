"""The column `scores`: its formulas on made clips, how it is made, and functions of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from reducio_latents import LatentTable, encode_corpus, open_store
from reducio_latents.encode import EncodeOptions, add_column
from reducio_latents.encode.scores import Scorer
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.upkeep.verify import verify
from reducio_latents.video.scores import FRAME_SCORES, score_frames
from tests.corpora import write_video

SMALL: dict[str, Any] = {"model": "reducio-random:8", "resolution": 32, "workers": 1}
Frames = NDArray[np.uint8]


def grey(levels: list[int], height: int = 96, width: int = 128) -> Frames:
    """Return flat frames of these levels."""
    flat = np.array(levels, np.uint8)[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(flat, (len(levels), height, width, 3)))


def texture(height: int = 256, width: int = 320, seed: int = 0) -> Frames:
    """Return a picture of soft blocks, (H, W, 3)."""
    small = np.random.RandomState(seed).randint(40, 216, (height // 8, width // 8, 3))
    return np.kron(small, np.ones((8, 8, 1))).astype(np.uint8)


def panned(step: int, count: int = 16) -> Frames:
    wide = texture(width=320 + step * count)
    return np.stack([wide[:, step * i : step * i + 320] for i in range(count)])


def test_a_still_clip_has_no_motion_and_is_frozen() -> None:
    found = score_frames(np.stack([texture()] * 16))
    assert (found["motion"], found["motion_max"], found["cut"], found["frozen"]) == (0, 0, 0, 1)
    assert set(found) == set(FRAME_SCORES)


def test_motion_is_the_mean_difference_of_frames_and_cut_what_stands_out() -> None:
    steady = score_frames(grey([10 * i for i in range(16)]))
    assert (steady["motion"], steady["motion_max"], steady["cut"]) == (10, 10, 0)
    cut = score_frames(grey([50] * 8 + [200] * 8))
    assert (cut["motion"], cut["motion_max"], cut["cut"]) == (10, 150, 150)
    assert score_frames(grey([50] * 15 + [200]))["cut"] == 150  # also in the last step
    assert score_frames(grey([50, 200]))["cut"] == 150
    flash = score_frames(grey([50] * 8 + [200] + [50] * 7))
    assert (flash["motion_max"], flash["cut"]) == (150, 0)
    assert score_frames(panned(8))["motion"] > 3 * score_frames(panned(1))["motion"] > 0


def test_a_cut_is_told_from_a_pan_and_a_dissolve() -> None:
    a, b = panned(2), np.stack([texture(seed=1)] * 16)
    weight = np.linspace(0, 1, 16)[:, None, None, None]
    dissolve = (a * (1 - weight) + b * weight).astype(np.uint8)
    hard = score_frames(np.concatenate([a[:8], b[:8]]))["cut"]
    assert hard > 20
    assert max(score_frames(clip)["cut"] for clip in (a, panned(8), dissolve)) < 5


def test_brightness_and_contrast_are_in_levels() -> None:
    half = grey([0] * 16)
    half[:, :, 64:] = 200
    found = score_frames(half)
    assert (found["brightness"], found["contrast"]) == (100, 100)
    fading = score_frames(grey([16 * i for i in range(16)]))
    assert (fading["brightness"], fading["contrast"]) == (120, 0)
    assert score_frames(grey([255]))["brightness"] == 255


def test_a_blurred_picture_is_less_sharp() -> None:
    sharp = texture()
    padded = np.pad(sharp.astype(float), ((3, 3), (3, 3), (0, 0)), mode="edge")
    parts = [padded[y : y + 256, x : x + 320] for y in range(7) for x in range(7)]
    blurred = np.mean(parts, axis=0).astype(np.uint8)
    found = [score_frames(np.stack([p] * 2))["sharpness"] for p in (sharp, blurred, sharp * 0)]
    assert found[0] > 4 * found[1] > 0 == found[2]


@pytest.mark.parametrize(("height", "width"), [(256, 320), (480, 832), (32, 32)])
def test_black_borders_are_their_share_of_the_picture(height: int, width: int) -> None:
    clip = np.stack([texture(height, width)] * 4)
    assert score_frames(clip)["borders"] == 0
    clip[:, : height // 8] = clip[:, -height // 8 :] = 3
    assert score_frames(clip)["borders"] == 0.25
    clip[:, :, : width // 4] = 0
    assert score_frames(clip)["borders"] == pytest.approx(1 - 0.75 * 0.75)
    clip[:] = 0
    assert score_frames(clip)["borders"] == 1
    clip[0] = 100  # a fade to black is no border
    assert score_frames(clip)["borders"] < 0.05


def test_frozen_is_the_share_of_frames_that_repeat_the_one_before() -> None:
    moving = panned(3)
    assert score_frames(moving)["frozen"] == 0
    assert score_frames(np.repeat(moving[:8], 2, axis=0))["frozen"] == pytest.approx(8 / 15)
    small = np.stack([texture()] * 16)
    small[:, :16, :16] = np.arange(0, 160, 10, dtype=np.uint8)[:, None, None, None]
    assert score_frames(small)["frozen"] == 0  # however small the part that moves


def test_a_picture_has_all_scores_and_a_pixel_too() -> None:
    picture = score_frames(texture()[None])
    assert (picture["motion"], picture["cut"], picture["frozen"]) == (0, 0, 0)
    assert picture["sharpness"] > 0
    for frames in (grey([7], 1, 1), grey([7, 9], 1, 300), grey([7], 2, 2)):
        assert np.isfinite(list(score_frames(frames).values())).all()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_video(folder / f"{number}.mp4", 2.1, seed=number)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what writes a module with a scorer, and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    count = 0

    def write(body: str, name: str = "") -> str:
        nonlocal count
        count += 1
        name = name or f"scorer_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{name}.py").write_text(f"def score(frames):\n    {body}\n")
        return f"{name}:score"

    return write


def test_a_store_that_was_begun_without_scores_goes_on_without_them_until_they_are_added(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = EncodeOptions.columns
    encode_corpus(corpus, tmp_path, columns=usual[:-1], **SMALL)
    assert encode_corpus(corpus, tmp_path, **SMALL).clips.encoded == 0
    assert "add-column" in caplog.text
    assert usual[-1] == "scores" not in open_store(tmp_path).columns
    assert add_column(tmp_path, ["scores"], workers=1).clips.failed == 0
    assert encode_corpus(corpus, tmp_path, **SMALL).clips.encoded == 0
    table = LatentTable(tmp_path)
    assert verify(table.store).ok
    assert len(table) == 6
    for entry in table:
        scores = entry["scores"]
        assert list(scores) == list(FRAME_SCORES)
        # The content image is the centre frame of the same pixels.
        still = score_frames(entry["content_image"].permute(1, 2, 0)[None].numpy())
        assert scores["sharpness"] == pytest.approx(still["sharpness"])
        assert scores["brightness"] == pytest.approx(still["brightness"], abs=20)
        assert scores["motion_max"] >= scores["motion"] > 0


def test_an_own_scorer_adds_its_numbers_and_its_fingerprint(
    corpus: Path, tmp_path: Path, own: Any
) -> None:
    store = tmp_path / "store"
    name = own(
        "return {'red': frames[..., 0].mean(), 'odd': None if frames.mean() > 127 else 1, "
        "'size': frames.shape[1]}"
    )
    settings = {**SMALL, "columns": ("scores",), "scorer": name}
    encode_corpus(corpus, store, **settings)
    table = LatentTable(store)
    assert verify(table.store).ok  # NaN is sound here
    scores = [entry["scores"] for entry in table]
    assert {score["size"] for score in scores} == {32.0}
    assert all(0 < score["red"] < 255 for score in scores)
    assert {score["odd"] for score in scores if not np.isnan(score["odd"])} <= {1.0}
    # Another source is another column, and is said to be.
    other = own("return {'red': 1, 'odd': 2, 'size': 3}")
    with pytest.raises(StoreError, match="scorer"):
        encode_corpus(corpus, store, **{**settings, "scorer": other})
    add_column(store, replacing=["scores"], scorer=other, workers=1)
    assert LatentTable(store)[0]["scores"]["red"] == 1


def test_the_fingerprint_is_of_the_source(tmp_path: Path, own: Any) -> None:
    first, again, other = (Scorer.load(own(body)) for body in ("return {}", "return {}", "pass"))
    assert first.source_sha256 == again.source_sha256 != other.source_sha256


def test_a_scorer_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"scorer_here_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text("def score(frames):\n    return {'a': 1}\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert Scorer.load(f"{name}:score").source_sha256


def test_a_clip_that_an_own_scorer_fails_on_is_recorded_and_the_run_goes_on(
    corpus: Path, tmp_path: Path, own: Any
) -> None:
    store = tmp_path / "store"
    tried = tmp_path / "tried"
    tried.write_text("0")
    # The first call is the one that tries it.
    name = own(
        f"p = {str(tried)!r}; n = int(open(p).read()); open(p, 'w').write(str(n + 1))\n"
        "    if n == 2: raise RuntimeError('no model')\n"
        "    if n == 3: frames[:] = 0\n"
        "    return {'a': float('inf')} if n == 4 else {'b': 1} if n == 5 else {'a': 1}"
    )
    report = encode_corpus(corpus, store, columns=("scores",), scorer=name, **SMALL)
    assert (report.clips.encoded, report.clips.failed) == (2, 4)
    reasons = [row["reason"] for row in pq.read_table(store / "errors.parquet").to_pylist()]
    said = ["RuntimeError: no model", "read-only", "infinity", "other scores"]
    assert all(any(word in reason for reason in reasons) for word in said), reasons
    assert len(LatentTable(store)) == 2
    assert verify(open_store(store)).ok


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {'motion': 1}", "is there already"),
        ("return 3", "no dict of numbers"),
        ("return {'a': 'high'}", "no dict of numbers"),
        ("return {'a\\nb': 1}", "no name of a score"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise ValueError('weights are missing')", "weights are missing"),
    ],
)
def test_a_scorer_that_cannot_work_is_refused_before_anything_is_made(
    corpus: Path, tmp_path: Path, own: Any, body: str, message: str
) -> None:
    settings = {**SMALL, "columns": ("scores",), "scorer": own(body)}
    with pytest.raises(ConfigError, match=message):
        encode_corpus(corpus, tmp_path / "store", **settings)
    assert not (tmp_path / "store" / "zarr.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scores", "module:function"),
        ("no_such_module:score", "PYTHONPATH"),
        ("json:loadz", "cannot be imported"),
        ("math:pi", "no function"),
        ("builtins:len", "no source file"),
    ],
)
def test_a_scorer_that_is_not_there_is_said_to_be(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scorer.load(name)
