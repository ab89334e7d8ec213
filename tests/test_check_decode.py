"""`decode` shows what is stored beside what it was made of, and refuses what it cannot decode."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from reducio_latents.check.clips import select_clips
from reducio_latents.check.decode import decode_store, mean_psnr
from reducio_latents.check.decoding import Originals, decode_clips
from reducio_latents.check.options import DecodeOptions, Selection
from reducio_latents.check.pictures import (
    GAP_PX,
    LABEL_PX,
    Panel,
    file_name,
    one_after_another,
    side_by_side,
)
from reducio_latents.cli import main
from reducio_latents.errors import ConfigError, LatentsError, StoreError
from reducio_latents.store import Store, open_store
from reducio_latents.video import reading
from reducio_latents.video.pixels import to_unit
from reducio_latents.video.processes import Channel
from reducio_latents.video.reading import ClipRequest
from tests.corpora import write_video as write_small_video
from tests.spot_check import SIDE, make_store, moving, record, write_video
from tests.test_encode_flow import encode

VIDEOS = {
    "a/one.mp4": moving(1, frames=32),
    "b/two.mp4": moving(2, frames=17),
    "bad.mp4": moving(3),
    "c.mp4": moving(4),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("decode")
    return make_store(folder, VIDEOS, broken=("bad.mp4",))


@pytest.fixture
def store(made: tuple[Path, Path]) -> Store:
    return open_store(made[0])


def clip_of(store: Store, video: str) -> str:
    rows = store.plan.clips.to_pylist()
    return str(next(row["clip_id"] for row in rows if row["video"] == video))


def choose(**settings: object) -> DecodeOptions:
    return DecodeOptions(selection=Selection(**settings))  # type: ignore[arg-type]


def test_every_clip_that_did_not_fail_can_be_chosen(store: Store) -> None:
    everything = select_clips(store, Selection(num=1000))
    assert sorted(clip.video for clip in everything) == ["a/one.mp4"] * 2 + ["b/two.mp4", "c.mp4"]
    assert select_clips(store, Selection(num=99)) == everything


def test_a_seed_names_the_same_clips_again_and_another_seed_others(store: Store) -> None:
    picks = {seed: select_clips(store, Selection(num=2, seed=seed)) for seed in range(6)}
    assert all(picks[seed] == select_clips(store, Selection(num=2, seed=seed)) for seed in picks)
    assert len({tuple(clip.clip_id for clip in pick) for pick in picks.values()}) > 1
    assert all(len({clip.clip_id for clip in pick}) == 2 for pick in picks.values())


def test_ids_are_decoded_in_the_order_given(store: Store) -> None:
    ids = (clip_of(store, "c.mp4"), clip_of(store, "a/one.mp4"))
    assert tuple(clip.clip_id for clip in select_clips(store, Selection(ids=ids))) == ids


def test_what_is_decoded_lies_beside_the_frames_it_was_made_of(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    results = decode_store(made[0], tmp_path / "out", choose(num=4))
    assert len(results) == 4
    for result in results:
        with av.open(str(result.path)) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert len(frames) == 16
        assert frames[0].shape == (LABEL_PX + SIDE, 2 * SIDE + GAP_PX, 3)
        scene = VIDEOS[result.clip.video][round(result.clip.start_s * 16) :][:16]
        left = np.stack(frames)[:, LABEL_PX:, :SIDE].astype(float)
        assert np.abs(left - scene).mean() < 6  # chroma is halved in the mp4
        right = np.stack(frames)[:, LABEL_PX:, SIDE + GAP_PX :].astype(float)
        assert np.abs(right - left).mean() > 3  # bicubic-32x loses nearly all detail
        assert result.psnr_db is not None
        assert 8 < result.psnr_db < 35
    assert mean_psnr(results) == pytest.approx(np.mean([r.psnr_db for r in results if r.psnr_db]))
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height > 4 * 2 * SIDE


def test_decoded_pixels_are_the_models_own_and_originals_those_that_were_encoded(
    made: tuple[Path, Path], store: Store
) -> None:
    """What is stored are the moments of exactly the frames that are read again."""
    decoder = store.decoder()
    model = decoder.load()
    clips = select_clips(store, Selection(num=4))
    with Originals(store) as originals:
        everything = list(decode_clips(decoder, clips, originals))
    assert len(everything) == 4
    for decoded in everything:
        assert decoded.original_THWC is not None
        assert decoded.content_HWC is not None
        np.testing.assert_array_equal(decoded.content_HWC, decoded.original_THWC[7])
        again = model.encode(to_unit(torch.from_numpy(decoded.original_THWC)[None]))
        np.testing.assert_allclose(again.mean, decoded.posterior.mean, atol=2e-3)


def test_a_sample_depends_on_its_seed_and_clip_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, corpus = make_store(
        tmp_path, {"a.mp4": moving(1), "b.mp4": moving(2)}, model="reducio-random:8"
    )
    corpus.rename(tmp_path / "moved")
    store = open_store(root)
    decoder, originals = store.decoder(), Originals(store)
    monkeypatch.setattr(
        decoder.load(), "decode", lambda z, content: torch.zeros(1, 3, 16, SIDE, SIDE)
    )
    clips = select_clips(store, Selection(num=1000))

    def latents(chosen: list[int], seed: int | None) -> list[np.ndarray]:
        picked = [clips[i] for i in chosen]
        found = decode_clips(decoder, picked, originals, sample_seed=seed)
        return [decoded.latents.numpy() for decoded in found]

    both, second, mean = latents([0, 1], 5), latents([1], 5), latents([1], None)
    np.testing.assert_array_equal(both[1], second[0])
    assert np.abs(second[0] - mean[0]).max() > 0
    assert np.abs(second[0] - latents([1], 6)[0]).max() > 0


def test_originals_that_changed_or_vanished_are_named_and_the_clip_is_decoded_without(
    tmp_path: Path,
) -> None:
    root, corpus = make_store(
        tmp_path, {"a.mp4": moving(1), "b.mp4": moving(2), "c.mp4": moving(4)}
    )
    write_video(corpus / "a.mp4", moving(1)[::-1])
    (corpus / "b.mp4").unlink()
    results = {r.clip.video: r for r in decode_store(root, tmp_path / "out", choose(num=3))}
    assert "a.mp4 has changed since it was encoded" in str(results["a.mp4"].problem)
    assert "b.mp4 is no longer at" in str(results["b.mp4"].problem)
    assert results["a.mp4"].psnr_db is None
    assert results["c.mp4"].problem is None
    assert all(result.path.stat().st_size > 1000 for result in results.values())


def hang(_: ClipRequest, __: Channel) -> None:
    time.sleep(60)


def test_an_original_whose_decoder_hangs_is_given_up_and_the_clip_is_decoded_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = make_store(tmp_path, {"a.mp4": moving(1, frames=32)})
    monkeypatch.setattr(reading, "read_request", hang)
    options = DecodeOptions(clip_timeout_s=3.0)
    began = time.monotonic()
    first, second = decode_store(root, tmp_path / "out", options)
    assert "the decoder hung: no answer for 3 s" in str(first.problem)
    assert second.problem == first.problem  # and is not waited for twice
    assert time.monotonic() - began < 300


def test_clips_can_be_written_as_animated_pictures(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = CliRunner().invoke(
        main, ["decode", str(made[0]), "--num", "2", "--out", str(out), "--format", "webp"]
    )
    assert ran.exit_code == 0, ran.output
    assert "all_clips.webp of all" in ran.output
    assert len(list(out.glob("*.webp"))) == 3
    assert not list(out.glob("*.mp4"))
    with Image.open(out / "all_clips.webp") as picture:
        assert (picture.format, picture.n_frames) == ("WEBP", 32)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="choose one of mp4, webp"):
        DecodeOptions(format="gif")  # type: ignore[arg-type]


def test_a_corpus_that_moved_is_found_again_where_it_is_said_to_be(tmp_path: Path) -> None:
    root, corpus = make_store(tmp_path, {"a.mp4": moving(1)})
    corpus.rename(tmp_path / "elsewhere")
    [lost] = decode_store(root, tmp_path / "out", choose(num=1))
    assert "no such file or folder); if it has moved, say by --corpus where to" in str(lost.problem)
    options = DecodeOptions(corpus=str(tmp_path / "elsewhere"))
    [found] = decode_store(root, tmp_path / "out", options)
    assert found.psnr_db is not None
    with pytest.raises(LatentsError, match="no such file or folder"):
        decode_store(root, tmp_path / "out", DecodeOptions(corpus=str(tmp_path / "nowhere")))


def test_originals_of_a_table_are_found_below_the_folder_that_its_paths_started_from(
    tmp_path: Path,
) -> None:
    write_small_video(tmp_path / "videos" / "v.mp4", 1.1, seed=1)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "some.csv").write_text("path\nv.mp4\n")
    root = str(tmp_path / "videos")
    encode(tmp_path / "lists" / "some.csv", tmp_path / "store", root=root)
    (result,) = decode_store(tmp_path / "store", tmp_path / "out", choose(num=1))
    assert result.psnr_db is not None, result.problem


def test_a_model_that_did_not_make_the_store_is_refused_with_what_differs(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"made by another model.*architecture is 'bicubic-32x'"):
        decode_store(made[0], tmp_path, DecodeOptions(model="reducio-random:8"))
    root, _ = make_store(tmp_path, {"a.mp4": moving(1)}, model="reducio-random:8")
    with pytest.raises(StoreError, match="weights_sha256"):
        decode_store(root, tmp_path, DecodeOptions(model="reducio-random:8:ft4:1"))


def test_a_store_without_content_images_cannot_be_decoded_by_a_model_that_needs_them(
    tmp_path: Path,
) -> None:
    videos = {"a.mp4": moving(1)}
    root, _ = make_store(tmp_path, videos, model="reducio-random:8", images=False)
    with pytest.raises(StoreError, match=r"no column content_image.*--columns"):
        decode_store(root, tmp_path / "out", choose(num=1))


def test_clips_that_are_not_there_are_refused_by_name(store: Store, tmp_path: Path) -> None:
    known = clip_of(store, "c.mp4")
    with pytest.raises(StoreError, match=f"no clip '{known[:-1]}'.*Did you mean {known}"):
        select_clips(store, Selection(ids=(known[:-1],)))
    with pytest.raises(StoreError, match=r"of bad.mp4 failed: it was bad"):
        select_clips(store, Selection(ids=(clip_of(store, "bad.mp4"),)))
    with pytest.raises(StoreError, match="no bucket 16x32x32; it has 16x64x64"):
        select_clips(store, Selection(buckets=("16x32x32",)))
    with pytest.raises(ConfigError, match="ask for at least 1"):
        Selection(num=0)
    ran = CliRunner().invoke(main, ["decode", "s", "--out", "o", "--ids", ", "])
    assert ran.exit_code == 2
    assert "'--ids': ', ' names nothing" in ran.output
    with pytest.raises(StoreError, match=r"no recorded PSNR.*--check-every"):
        select_clips(store, Selection(worst=True))


def test_a_clip_of_another_bucket_than_asked_for_is_called_so(store: Store) -> None:
    store.meta = replace(store.meta, buckets=("16x32x32", "16x64x64"))
    known = clip_of(store, "c.mp4")
    assert select_clips(store, Selection(ids=(known,), buckets=("16x64x64",)))
    with pytest.raises(StoreError, match=f"clip {known} is of bucket 16x64x64, not of 16x32x32"):
        select_clips(store, Selection(ids=(known,), buckets=("16x32x32",)))


def test_the_worst_clips_are_those_of_the_lowest_recorded_psnr(tmp_path: Path) -> None:
    videos = {f"{n}.mp4": moving(n) for n in range(1, 5)}
    root, _ = make_store(tmp_path, videos, broken=("2.mp4",))
    store = open_store(root)
    recorded = {"1.mp4": 30.0, "2.mp4": 10.0, "4.mp4": 20.0}  # 3.mp4 was not measured
    record(root, {clip_of(store, video): value for video, value in recorded.items()})
    worst = select_clips(store, Selection(worst=True, num=2))
    assert [clip.video for clip in worst] == ["4.mp4", "1.mp4"]
    (root / "quality.parquet").write_bytes(b"no table")
    with pytest.raises(StoreError, match=r"quality.parquet cannot be read"):
        select_clips(store, Selection(worst=True))


def test_a_store_of_failed_clips_alone_says_so(tmp_path: Path) -> None:
    root, _ = make_store(tmp_path, {"a.mp4": moving(1)}, broken=("a.mp4",))
    with pytest.raises(StoreError, match="holds no encoded clip"):
        decode_store(root, tmp_path / "out", choose(num=1))


def test_a_damaged_row_is_one_clear_error(tmp_path: Path) -> None:
    root, _ = make_store(tmp_path, {"a.mp4": moving(1)})
    file = root / "16x64x64/motion/c/0/0/0/0/0"
    data = bytearray(file.read_bytes())
    data[5] ^= 255
    file.write_bytes(data)
    with pytest.raises(StoreError, match="does not match its checksum"):
        decode_store(root, tmp_path / "out", choose(num=1))


def test_the_command_prints_a_line_a_clip_and_the_mean(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "pictures"
    ran = CliRunner().invoke(main, ["decode", str(made[0]), "--num", "2", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert ran.output.count("PSNR") == 3
    assert "mean PSNR" in ran.output
    assert len(list(out.glob("*.mp4"))) == 3
    with av.open(str(out / "all_clips.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 32
    gone = CliRunner().invoke(main, ["decode", str(made[0]), "--ids", "x", "--out", str(out)])
    assert gone.exit_code == 1
    assert gone.output.startswith("Error: ")
    assert len(gone.output.strip().splitlines()) == 1


def test_a_reason_that_holds_for_all_clips_is_printed_once(tmp_path: Path) -> None:
    root, corpus = make_store(tmp_path, {"a.mp4": moving(1), "b.mp4": moving(2)})
    corpus.rename(tmp_path / "elsewhere")
    ran = CliRunner().invoke(main, ["decode", str(root), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    assert ran.output.count("the corpus is not reachable") == 1
    assert ran.output.count("s  no original") == 2
    assert "no original to compare with: 2 of 2 clips" in ran.output


def test_a_place_that_cannot_be_written_is_one_error(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(StoreError, match="cannot write"):
        decode_store(made[0], tmp_path / "file", choose(num=1))
    (tmp_path / "out" / "contact_sheet.png").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot write .*contact_sheet.png"):
        decode_store(made[0], tmp_path / "out", choose(num=1))


def test_panels_stand_side_by_side_on_even_sides() -> None:
    red = np.full((3, 31, 33, 3), (255, 0, 0), np.uint8)
    both = side_by_side([Panel("red", red), Panel("black", red * 0)], labelled=False)
    assert both.shape == (3, 32, 70, 3)
    assert (both[:, :31, :33] == red).all()
    assert (both[:, :31, 33 + GAP_PX : 66 + GAP_PX] == 0).all()


def test_a_label_longer_than_its_panel_does_not_run_into_the_next() -> None:
    dark = np.zeros((1, 32, 64, 3), np.uint8)
    both = side_by_side([Panel("reducio-tiny-ft4-fs32", dark), Panel("b", dark)])
    alone = side_by_side([Panel("", dark), Panel("b", dark)])
    right = slice(64 + GAP_PX, None)
    np.testing.assert_array_equal(both[:, :LABEL_PX, right], alone[:, :LABEL_PX, right])
    assert both[:, :LABEL_PX, :64].max() > 200


def test_clips_of_several_sizes_follow_one_another_whole() -> None:
    small, large = np.full((2, 4, 6, 3), 9, np.uint8), np.full((3, 8, 2, 3), 200, np.uint8)
    joined = one_after_another([small, large])
    assert joined.shape == (5, 8, 6, 3)
    assert (joined[:2, :4, :6] == 9).all()
    assert (joined[2:, :8, :2] == 200).all()


@pytest.mark.parametrize("clip_id", ["../../etc/passwd", "a/b", ".hidden", ""])
def test_a_clip_id_never_leaves_the_folder(clip_id: str) -> None:
    name = file_name(clip_id)
    assert "/" not in name
    assert not name.startswith(".")
    assert name
