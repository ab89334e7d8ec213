"""What is wrong with latents and clips is found and named, by thresholds that are stated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from reducio_latents.check.clips import select_clips
from reducio_latents.check.health import (
    FP16_MAX,
    LatentScan,
    frame_faults,
    scan_store,
    store_stats,
)
from reducio_latents.check.options import Selection, StatsOptions
from reducio_latents.cli import main
from reducio_latents.errors import StoreError
from reducio_latents.store import open_store
from reducio_latents.video.scores import score_frames
from tests.spot_check import Frames, make_store, moving


def moments(seed: int, *, logvar: float = -4.0) -> np.ndarray:
    """Return sound moments of 4 channels, (8, 2, 3, 3), float16."""
    mean = np.random.RandomState(seed).standard_normal((4, 2, 3, 3))
    return np.concatenate([mean, np.full_like(mean, logvar)]).astype(np.float16)


def scan_of(rows: dict[str, np.ndarray]) -> LatentScan:
    scan = LatentScan()
    for clip_id, row in rows.items():
        scan.add_moments(clip_id, row, row.tobytes())
    return scan


def found(scan: LatentScan) -> dict[str, tuple[str, ...]]:
    return {warning.kind: warning.clips for warning in scan.warnings()}


def test_sound_latents_raise_no_warning() -> None:
    assert found(scan_of({f"clip{seed}": moments(seed) for seed in range(8)})) == {}


def test_a_channel_that_hardly_varies_is_dead() -> None:
    rows = {f"clip{seed}": moments(seed) for seed in range(8)}
    for row in rows.values():
        row[2] = 0.25
    [warning] = scan_of(rows).warnings()
    assert warning.kind == "dead channels"
    assert warning.text.startswith("channels 2 hardly vary")
    assert warning.clips == ("clip0", "clip1", "clip2")


def test_statistics_are_those_of_all_values_together() -> None:
    rows = {f"clip{seed}": moments(seed) for seed in range(8)}
    means = np.stack([row[:4] for row in rows.values()]).astype(np.float64)
    np.testing.assert_allclose(scan_of(rows).channel_std, means.std((0, 2, 3, 4)), rtol=1e-6)
    kl = 0.5 * (means**2 + np.exp(-4.0) - 1 + 4.0)
    np.testing.assert_allclose(scan_of(rows).channel_kl, kl.mean((0, 2, 3, 4)), rtol=1e-6)


def test_a_posterior_like_the_prior_has_collapsed() -> None:
    prior = {f"clip{seed}": moments(seed, logvar=0.0) for seed in range(8)}
    for row in prior.values():
        row[:4] *= np.float16(0.01)
    scan = scan_of(prior)
    kinds = [warning.kind for warning in scan.warnings()]
    assert kinds.count("posterior collapse") == 2  # channels, and clips
    assert scan.warnings()[-1].clips == tuple(prior)


def test_values_at_the_end_of_float16_are_saturated_and_nan_is_not_finite() -> None:
    rows = {f"clip{seed}": moments(seed) for seed in range(8)}
    rows["clip3"][0, 0, 0, 0] = -FP16_MAX
    rows["clip5"][1, 1, 1, 1] = np.nan
    warnings = found(scan_of(rows))
    assert warnings["saturated float16"] == ("clip3",)
    assert warnings["not finite"] == ("clip5",)


def test_clips_with_equal_latents_are_duplicates() -> None:
    rows = {f"clip{seed}": moments(seed % 6) for seed in range(8)}
    assert found(scan_of(rows)) == {"duplicate clips": ("clip0", "clip6", "clip1", "clip7")}


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("moving", []),
        ("still", ["frozen clips"]),
        ("dark", ["black clips", "frozen clips"]),
        ("cut", ["cut-through clips"]),
        ("flashing", []),
    ],
)
def test_frozen_black_and_cut_through_clips_are_told_apart(name: str, faults: list[str]) -> None:
    scene, other = moving(1), 255 - moving(2) // 2
    clips: dict[str, Frames] = {
        "moving": scene,
        "still": np.repeat(scene[:1], 16, axis=0),
        "dark": np.full_like(scene, 9),
        "cut": np.concatenate([scene[:6], other[6:]]),
        "flashing": np.stack([scene[0], other[0]] * 8),  # much motion all through is no cut
    }
    assert list(frame_faults(clips[name])) == faults


@pytest.mark.parametrize("name", ["moving", "still", "cut", "flashing"])
def test_scores_tell_frozen_and_cut_through_clips_as_frames_do(name: str) -> None:
    scene, other = moving(1), 255 - moving(2) // 2
    frames = {
        "moving": scene,
        "still": np.repeat(scene[:1], 16, axis=0),
        "cut": np.concatenate([scene[:6], other[6:]]),
        "flashing": np.stack([scene[0], other[0]] * 8),
    }[name]
    by_frames, by_scores = LatentScan(), LatentScan()
    by_frames.add_frames("a", frames)
    by_scores.add_scores("a", score_frames(frames), 16)
    assert [w.kind for w in by_scores.warnings()] == [w.kind for w in by_frames.warnings()]
    assert by_scores.scored == 1


def test_a_black_clip_with_a_few_bright_pixels_is_still_black_but_not_half_of_one() -> None:
    frames = np.zeros((2, 20, 20, 3), np.uint8)
    frames[:, 0, :3] = 255
    assert "black clips" in frame_faults(frames)
    frames[:, :10] = 40
    assert "black clips" not in frame_faults(frames)


def test_warnings_of_frames_name_the_clips_and_the_threshold() -> None:
    scan = LatentScan()
    still = moving(1)[:1].repeat(16, axis=0)
    for name, frames in [("a", moving(1)), ("b", still), ("c", moving(2)), ("b", still[:1])]:
        scan.add_frames(name, frames)
    [warning] = scan.warnings()
    assert (warning.kind, warning.clips) == ("frozen clips", ("b",))
    assert "0.5 of 255" in warning.text


def test_a_store_is_scanned_clip_by_clip_without_those_that_failed(tmp_path: Path) -> None:
    dark = np.zeros_like(moving(1))
    videos = {"a.mp4": moving(1), "b.mp4": dark, "c.mp4": moving(3), "d.mp4": dark[:, ::2, ::2]}
    root, _ = make_store(tmp_path, videos, broken=("c.mp4",))
    store = open_store(root)
    told: list[tuple[int, int]] = []
    scan = LatentScan()
    scan_store(store, scan, lambda done, total: told.append((done, total)))
    assert scan.clips == 3
    assert told[-1] == (3, 3)
    names = dict(zip(*(store.plan.clips[c].to_pylist() for c in ("clip_id", "video")), strict=True))
    black = next(w for w in scan.warnings() if w.kind == "black clips")
    twins = next(w for w in scan.warnings() if w.kind == "duplicate clips")
    assert {names[clip] for clip in black.clips} == {"b.mp4", "d.mp4"}
    assert set(twins.clips) == set(black.clips)


def test_stats_look_at_some_originals_and_say_how_many(tmp_path: Path) -> None:
    videos = {f"{n}.mp4": moving(n) for n in range(1, 5)}
    videos["still.mp4"] = moving(9)[:1].repeat(16, axis=0)
    root, corpus = make_store(tmp_path, videos)
    everything = store_stats(root)
    kinds = {warning.kind: len(warning.clips) for warning in everything.warnings}
    assert kinds["frozen clips"] == 1
    assert (everything.looked, everything.notes) == (5, ())
    some = store_stats(root, StatsOptions(look=2))
    assert some.looked == 2
    assert some.notes == ("Frozen and cut-through clips were looked for in 2 of 5 clips.",)
    (corpus / "1.mp4").unlink()
    assert "1 original could not be read" in store_stats(root).notes[0]
    corpus.rename(tmp_path / "moved")
    assert "corpus is not reachable" in store_stats(root).notes[0]


def test_a_damaged_row_is_named_and_counts_in_no_statistics(tmp_path: Path) -> None:
    root, _ = make_store(tmp_path, {"a.mp4": moving(1), "b.mp4": moving(2)})
    store = open_store(root)
    alone = {}
    for clip in select_clips(store, Selection(num=1000)):
        row = store.read_row(clip.key, clip.row, "motion")
        assert isinstance(row, np.ndarray)
        alone[clip.clip_id] = scan_of({clip.clip_id: row}).channel_kl
    file = root / "16x64x64/motion/c/0/0/0/0/0"
    data = bytearray(file.read_bytes())
    data[5] ^= 255
    file.write_bytes(data)
    stats = store_stats(root)
    [damaged] = [w for w in stats.warnings if w.kind == "damaged clips"]
    assert len(damaged.clips) == 1
    assert stats.scan.clips == 2
    [other] = set(alone) - set(damaged.clips)
    np.testing.assert_array_equal(stats.scan.channel_kl, alone[other])


def test_a_store_without_a_clip_is_refused(tmp_path: Path) -> None:
    root, _ = make_store(tmp_path, {"a.mp4": moving(1)}, broken=("a.mp4",))
    with pytest.raises(StoreError, match="holds no encoded clip"):
        store_stats(root)


def test_a_black_clip_is_named_once_though_two_looks_see_it(tmp_path: Path) -> None:
    root, _ = make_store(tmp_path, {"a.mp4": moving(1), "b.mp4": np.zeros_like(moving(1))})
    warnings = [w for w in store_stats(root).warnings if w.kind == "black clips"]
    assert [len(w.clips) for w in warnings] == [1]


def test_the_stats_command_prints_warnings_for_people_and_for_programs(tmp_path: Path) -> None:
    still = moving(9)[:1].repeat(16, axis=0)
    root, _ = make_store(tmp_path, {"a.mp4": moving(1), "still.mp4": still})
    ran = CliRunner().invoke(main, ["stats", str(root)])
    assert ran.exit_code == 0, ran.output
    assert "warning: frozen clips: no frame differs from the last by more than 0.5" in ran.output
    parsed = json.loads(CliRunner().invoke(main, ["stats", str(root), "--json"]).stdout)
    assert parsed["clips"] == 2
    assert {w["kind"] for w in parsed["warnings"]} >= {"frozen clips"}
    assert len(parsed["channel_std"]) == 3
