"""`evaluate` puts every model before the same clips, and says what its numbers mean."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from reducio_latents.autoencoders import LOADERS, load_autoencoder
from reducio_latents.autoencoders.baselines import Bicubic
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.check.benchmarks import PRESETS, PresetName, as_videos
from reducio_latents.check.evaluate import (
    corpus_names,
    evaluate,
    frame_rule,
    round_trip,
)
from reducio_latents.check.options import EvaluateOptions, ModelChoice, SampleSpec
from reducio_latents.check.sample import read_sample
from reducio_latents.check.table import as_csv, as_json, markdown, write_tables
from reducio_latents.cli import main
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.core.values import Posterior
from reducio_latents.errors import (
    ConfigError,
    CorpusError,
    GeometryError,
    StoreError,
    WeightsError,
)
from reducio_latents.metrics.i3d import I3D
from reducio_latents.metrics.psnr import PROTOCOLS, psnr
from reducio_latents.metrics.suite import load_suite
from reducio_latents.video import reading
from reducio_latents.video.processes import Channel
from reducio_latents.video.reading import ClipRequest, read_request
from tests.spot_check import moving, write_video

QUICK = ("psnr", "ssim", "flicker")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(1, 5):
        write_video(folder / f"{n}.mp4", moving(n, frames=14 + 4 * n))
    write_video(folder / "short.mp4", moving(9, frames=5))
    (folder / "text.mp4").write_text("not a video")
    return folder


def options(*names: str, **settings: Any) -> EvaluateOptions:
    sample = settings.pop("sample", SampleSpec(resolution=64))
    defaults = {"sample": sample, "metrics": QUICK, "device": "cpu", **settings}
    return EvaluateOptions(models=tuple(map(ModelChoice.parse, names)), **defaults)


class CausalBicubic(Bicubic):
    """Takes 8k + 1 frames, as causal models do, and keeps every 8th of them."""

    name = "causal"
    geometry = LatentGeometry(channels=3, temporal_stride=8, spatial_stride=32, causal=True)
    seen: tuple[int, ...] = ()

    def encode(self, video_BCTHW: Tensor) -> Posterior:
        self.seen = tuple(video_BCTHW.shape)
        assert torch.equal(video_BCTHW[:, :, 15], video_BCTHW[:, :, 16])
        return Posterior(video_BCTHW[:, :, ::8, ::32, ::32], video_BCTHW[:, :, ::8, ::32, ::32])

    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        steps = latents.shape[2]
        small = torch.nn.functional.interpolate(latents, scale_factor=(1.0, 32.0, 32.0))
        return small.repeat_interleave(8, dim=2)[:, :, : 8 * (steps - 1) + 1]


def load_causal(name: str, weights: Path | None, choice: LoadOptions) -> CausalBicubic:
    return CausalBicubic(choice)


@pytest.fixture
def causal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOADERS, "causal", f"{__name__}:load_causal")


def test_the_sample_is_seeded_and_a_video_that_fails_gives_its_place_to_another(
    corpus: Path,
) -> None:
    def videos(seed: int, number: int | None) -> list[str]:
        spec = SampleSpec(resolution=64, videos=number, clip=ClipSpec(policy="centre", seed=seed))
        with read_sample(corpus, spec) as sample:
            return [clip.video for clip in sample.clips]

    assert all(len(videos(seed, 3)) == 3 for seed in range(6))
    assert len({tuple(videos(seed, 3)) for seed in range(6)}) > 1
    assert videos(1, 3) == videos(1, 3)
    assert sorted(videos(0, 99)) == videos(0, None) == ["1.mp4", "2.mp4", "3.mp4", "4.mp4"]


def test_the_sample_holds_the_frames_of_the_videos_and_names_those_without_any(
    corpus: Path,
) -> None:
    with read_sample(corpus, SampleSpec(resolution=64)) as sample:
        for number, clip in enumerate(sample.clips):
            first = round(clip.start_s * 16)
            scene = moving(int(clip.video[0]), frames=40)[first : first + 16]
            assert np.abs(sample[number].astype(int) - scene).mean() < 1.5
        assert set(sample.failed) == {"short.mp4", "text.mp4"}
        assert "shorter than a clip of 1 s" in sample.failed["short.mp4"]
        batches = list(sample.batches(3))
        assert [len(batch) for batch in batches] == [3, 1]
        np.testing.assert_array_equal(batches[1][0], sample[3])


def hang_at_the_first(request: ClipRequest, channel: Channel) -> None:
    if request.video == "0.mp4":
        time.sleep(600)
    read_request(request, channel)


def test_a_video_that_hangs_costs_its_own_clip_and_not_the_evaluation(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "read_request", hang_at_the_first)
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).symlink_to(corpus / name)
    found = evaluate(
        {"demo": tmp_path},
        options("repeat-content", sample=SampleSpec(resolution=64, timeout_s=3.0)),
    )
    assert found.methods[0].datasets["demo"].clips == 1
    assert found.datasets["demo"] == {"0.mp4": "0.mp4: the decoder hung: no answer for 3 s"}
    told = "1 video of demo gave no clip, such as 0.mp4: the decoder hung: no answer for 3 s."
    assert told in markdown(found)


def test_the_sample_is_the_same_however_many_processes_read_it(corpus: Path) -> None:
    spec = SampleSpec(resolution=64, videos=3, clip=ClipSpec(policy="uniform:2", seed=3))
    with read_sample(corpus, spec) as one, read_sample(corpus, replace(spec, workers=3)) as many:
        assert one.clips == many.clips
        assert len(one) == 6
        for number in range(6):
            np.testing.assert_array_equal(one[number], many[number])


def test_a_corpus_without_a_single_clip_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", moving(1, frames=5))
    with pytest.raises(CorpusError, match=r"gives no clip to evaluate: short.mp4: it is shorter"):
        read_sample(tmp_path, SampleSpec(resolution=64))
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(
        CorpusError, match=r"to evaluate \(2 videos tried\): /.*/a.mp4: it is a text"
    ):
        read_sample(tmp_path, SampleSpec(resolution=64))


def test_repeat_content_shows_the_centre_frame_sixteen_times() -> None:
    model = load_autoencoder("repeat-content")
    clip = moving(1)
    made = round_trip(model, clip[None], frame_rule(model, 16, 64, 64))
    assert made.video_BCTHW.shape == (1, 3, 16, 64, 64)
    expected = torch.from_numpy(clip[7]).permute(2, 0, 1).float() / 127.5 - 1
    for frame in made.video_BCTHW[0].transpose(0, 1):
        torch.testing.assert_close(frame, expected)
    with pytest.raises(ConfigError, match="no latents to store"):
        load_autoencoder("repeat-content", parts="encoder")
    with pytest.raises(ConfigError, match="has no weights"):
        load_autoencoder("repeat-content", "file.ckpt")


def test_bicubic_keeps_the_mean_of_a_constant_clip_and_a_32nd_of_its_side() -> None:
    model = load_autoencoder("bicubic-32x")
    video = torch.full((2, 3, 16, 96, 64), 0.3)
    posterior = model.encode(video)
    assert posterior.mean.shape == (2, 3, 16, 3, 2)
    torch.testing.assert_close(model.decode(model.final_latents(posterior)), video)
    with pytest.raises(GeometryError, match="width=64"):
        model.encode(video[..., :60])


def test_the_table_has_a_row_a_model_and_the_numbers_of_the_metrics(
    corpus: Path, tmp_path: Path
) -> None:
    found = evaluate({"demo": corpus}, options("repeat-content", "bicubic-32x"), tmp_path)
    assert [method.name for method in found.methods] == ["repeat-content", "bicubic-32x"]
    with read_sample(corpus, SampleSpec(resolution=64)) as sample:
        clips = [torch.from_numpy(sample[n]).permute(0, 3, 1, 2) / 255 for n in range(4)]
    by_hand = [psnr(clip, clip[7:8].expand_as(clip)).mean().item() for clip in clips]
    scores = found.methods[0].datasets["demo"]
    assert scores.scores["psnr"] == pytest.approx(np.mean(by_hand), abs=1e-3)
    assert scores.clips == 4
    assert found.methods[1].datasets["demo"].bytes_per_s == 16 * 3 * 2 * 2 * 2
    assert scores.bytes_per_s > 100  # the content image alone
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"demo.png", *(f"demo-{n:03d}.mp4" for n in range(4))}


def test_a_metric_named_twice_is_counted_once(corpus: Path) -> None:
    once, twice = (
        evaluate({"demo": corpus}, options("bicubic-32x", metrics=metrics)).methods[0]
        for metrics in [("psnr",), ("psnr", "psnr")]
    )
    assert once.datasets["demo"].scores == twice.datasets["demo"].scores


def test_batches_change_no_number(corpus: Path) -> None:
    one = evaluate({"demo": corpus}, options("bicubic-32x"))
    three = evaluate({"demo": corpus}, options("bicubic-32x", batch_size=3))
    for metric in QUICK:
        assert one.methods[0].datasets["demo"].scores[metric] == pytest.approx(
            three.methods[0].datasets["demo"].scores[metric], rel=1e-5
        )


def test_a_model_with_another_frame_rule_gets_repeated_frames_that_are_not_measured(
    corpus: Path, causal: None
) -> None:
    model = CausalBicubic(LoadOptions())
    made = round_trip(model, moving(1)[None], frame_rule(model, 16, 64, 64))
    assert model.seen == (1, 3, 17, 64, 64)
    assert made.video_BCTHW.shape[2] == 16
    found = evaluate({"demo": corpus}, options("causal"))
    assert found.methods[0].frames == "16 as 17"
    assert "the last one was repeated" in markdown(found)
    with pytest.raises(GeometryError, match="causal: height is 60"):
        frame_rule(model, 16, 60, 64)


def test_an_untrained_model_is_marked(corpus: Path) -> None:
    spec = SampleSpec(resolution=32, videos=1)
    found = evaluate({"demo": corpus}, options("reducio-random:8", metrics=("psnr",), sample=spec))
    assert found.methods[0].untrained
    assert found.methods[0].parameters > 100_000
    assert "| reducio-random:8, random weights | 4x32x32 | 16 |" in markdown(found)


def test_unusable_models_are_told_before_any_video_is_read(tmp_path: Path) -> None:
    nowhere = {"demo": tmp_path / "no corpus here"}
    with pytest.raises(WeightsError, match="needs its weights"):
        evaluate(nowhere, options("bicubic-32x", "reducio-ft4-fs32"))
    odd = options("bicubic-32x", sample=SampleSpec(resolution=50))
    with pytest.raises(GeometryError, match=r"bicubic-32x: height is 50.*height=64"):
        evaluate(nowhere, odd)
    with pytest.raises(ConfigError, match="no metric 'pnsr'"):
        evaluate(nowhere, options("bicubic-32x", metrics=("pnsr",)))
    with pytest.raises(ConfigError, match="no model is named"):
        options()
    with pytest.raises(ConfigError, match="--model bicubic-32x is given twice"):
        options("bicubic-32x", "repeat-content", "bicubic-32x")
    with pytest.raises(ConfigError, match="no metric is named; choose of psnr"):
        options("bicubic-32x", metrics=())
    with pytest.raises(ConfigError, match="pictures must be >= 0"):
        options("bicubic-32x", pictures=-1)
    (tmp_path / "file").write_text("taken")
    with pytest.raises(StoreError, match="cannot write to"):
        evaluate(nowhere, options("bicubic-32x"), tmp_path / "file" / "out")


def test_a_metric_without_weights_is_named_with_its_remedy_and_has_no_number(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    everything = ("psnr", "lpips-alex", "lpips-vgg", "fvd")
    told: list[str] = []
    chosen = options("bicubic-32x", metrics=everything)
    with pytest.raises(CorpusError):  # before any video is read
        evaluate({"demo": tmp_path / "nowhere"}, chosen, on_missing=told.append)
    assert [line.partition(" is unavailable")[0] for line in told] == [
        "LPIPS (alex)",
        "LPIPS (vgg)",
        "FVD",
    ]
    found = evaluate({"demo": corpus}, chosen)
    text = markdown(found)
    assert set(found.unavailable) == {"lpips-alex", "lpips-vgg", "fvd"}
    assert text.count("n/a") == 3
    assert "Download https://download.pytorch.org/models/vgg16" in text
    [row] = list(csv.DictReader(as_csv(found).splitlines()))
    assert (row["fvd"], row["lpips-vgg"]) == ("", "")
    assert float(row["psnr"]) > 10
    with pytest.raises(WeightsError, match="no such weights file"):
        load_suite(["fvd"], PROTOCOLS["standard"], fvd_weights=tmp_path / "missing.pt")


def test_rfvd_has_a_column_a_corpus_is_zero_where_nothing_changes_and_tells_its_bias(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    torch.save(I3D().state_dict(), tmp_path / "i3d.pt")
    for name in ("x", "y"):
        write_video(tmp_path / "b" / f"{name}.mp4", moving(ord(name)))
    # Coarse pixels stand for the features here; I3D itself has its own tests, and takes long.
    coarse = torch.nn.AdaptiveAvgPool3d((1, 10, 40))
    monkeypatch.setattr(I3D, "forward", lambda self, x: coarse(x)[:, 0].flatten(1))
    monkeypatch.setattr(Bicubic, "decode", lambda self, latents, content=None: latents)
    monkeypatch.setattr(Bicubic, "encode", lambda self, video: Posterior(video, video * 0))
    chosen = options(
        "bicubic-32x",
        "repeat-content",
        metrics=("psnr", "fvd"),
        fvd_weights=tmp_path / "i3d.pt",
        sample=SampleSpec(resolution=32, videos=2, clip=ClipSpec(frames=9, policy="centre")),
    )
    found = evaluate({"a": corpus, "b": tmp_path / "b"}, chosen)
    for name in ("a", "b"):
        same, still = (method.datasets[name].scores["fvd"] for method in found.methods)
        assert same == pytest.approx(0, abs=1e-6)
        assert still > same
    text = markdown(found)
    assert found.biased
    assert "rFVD is biased upwards with 400 clips or fewer" in text
    assert "| rFVD (a) | rFVD (b) |" in text
    assert "rFVD by i3d_pretrained_400.pt" in text
    assert "In the first table all but rFVD is of a." in text
    other = found.methods[1].datasets["b"].scores["psnr"]
    assert f"| repeat-content | {other:.2f} |" in text.partition("On b:")[2]
    rows = csv.DictReader(as_csv(found).splitlines())
    assert [row["corpus"] for row in rows] == ["a", "b", "a", "b"]


def test_tables_are_written_as_markdown_csv_and_json(corpus: Path, tmp_path: Path) -> None:
    found = evaluate({"demo": corpus}, options("bicubic-32x"))
    paths = write_tables(found, tmp_path / "new")
    assert [path.name for path in paths] == ["table.md", "table.csv", "table.json", "rate.png"]
    with Image.open(paths[3]) as plot:
        assert plot.size == (1200, 750)
    assert "(rate.png)" in paths[0].read_text()
    (row,) = csv.DictReader(paths[1].open())
    assert float(row["kbit_per_s"]) == pytest.approx(float(row["bytes_per_s"]) / 125)
    rate = float(row["psnr"]) / float(row["kbit_per_s"])
    assert float(row["db_per_kbit_per_s"]) == pytest.approx(rate)
    parsed = json.loads(paths[2].read_text())
    assert parsed["methods"][0]["strides"] == [1, 32]
    assert parsed["protocol"]["name"] == "standard"
    assert json.loads(as_json(found)) == parsed
    rows = [line for line in paths[0].read_text().splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_published_sets_are_read_as_they_lie_on_a_disk(tmp_path: Path) -> None:
    """DAVIS as sequences of JPEG files, Xiph's as .y4m, MCL-JCV's as raw 4:2:0."""
    davis, seen = tmp_path / "DAVIS", {}
    for number, name in enumerate(("bear", "dog", "train-only")):
        folder = davis / "JPEGImages" / "480p" / name
        folder.mkdir(parents=True)
        for frame, picture in enumerate(moving(number, frames=26)):
            Image.fromarray(picture).save(folder / f"{frame:05d}.jpg", quality=90)
    names = davis / "ImageSets" / "2017" / "val.txt"
    names.parent.mkdir(parents=True)
    names.write_text("bear\ndog\n")
    yuv = np.random.default_rng(0).integers(16, 235, (26, 96, 64), np.uint8)
    frames = b"".join(b"FRAME\n" + frame.tobytes() for frame in yuv)
    for set_name, name, data in (
        ("xiph", "a_cif.y4m", b"YUV4MPEG2 W64 H64 F24:1 Ip C420jpeg\n" + frames),
        ("mcl", "videoSRC01_64x64_24.yuv", yuv.tobytes()),
    ):
        (tmp_path / set_name).mkdir()
        (tmp_path / set_name / name).write_bytes(data)
    spec = SampleSpec(resolution=64, workers=1)
    presets: tuple[tuple[PresetName, Path], ...] = (
        ("davis", davis),
        ("xiph", tmp_path / "xiph"),
        ("mcl-jcv", tmp_path / "mcl"),
    )
    for preset, folder in presets:
        with as_videos(preset, folder) as at, read_sample(at, spec, preset=preset) as sample:
            seen[preset] = [clip.video for clip in sample.clips], sample[0]
    assert seen["davis"][0] == ["bear.mkv", "dog.mkv"]
    start = round(24 * (26 / 24 - 1) / 2)  # the middle second; 16 frames of 24
    with Image.open(davis / "JPEGImages" / "480p" / "bear" / f"{start:05d}.jpg") as first:
        wanted = np.array(first.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC), float)
    assert np.abs(seen["davis"][1][0] - wanted).mean() < 2
    assert np.array_equal(seen["xiph"][1], seen["mcl-jcv"][1])


def test_a_folder_that_is_not_laid_out_as_its_preset_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    assert set(PRESETS) == set(get_args(PresetName))
    for preset in ("mcl-jcv", "xiph"):
        with pytest.raises(CorpusError, match=rf"1\.mp4, which is not of {preset}: that is"):
            evaluate({"demo": corpus}, options("bicubic-32x", preset=preset))
    with pytest.raises(CorpusError, match=r"holds no sequence of JPEG files; davis is JPEGImages"):
        evaluate({"demo": corpus}, options("bicubic-32x", preset="davis"))
    (tmp_path / "raw.yuv").write_bytes(bytes(96))
    with pytest.raises(CorpusError, match=r"have its name say it: NAME_1920x1080_30\.yuv"):
        evaluate({"demo": tmp_path}, options("bicubic-32x"))


def test_names_of_corpora_and_models_are_read_as_written() -> None:
    assert dict(corpus_names(["a=x/y", "/data/pexels/", "ucf.csv"])) == {
        "a": "x/y",
        "pexels": "/data/pexels/",
        "ucf": "ucf.csv",
    }
    globs = ["/data/pexels/*.mp4", "ucf/**/*.avi", "*.mp4"]
    assert list(dict(corpus_names(globs))) == ["pexels", "ucf", "corpus"]
    with pytest.raises(ConfigError, match="two corpora are called 'x'"):
        dict(corpus_names(["a/x", "b/x"]))
    assert ModelChoice.parse("diffusers:a/b") == ModelChoice("diffusers:a/b")
    with pytest.raises(ConfigError, match="write NAME or NAME=WEIGHTS"):
        ModelChoice.parse("=file")


def test_the_command_prints_the_table_and_presets_follow_the_paper(
    corpus: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", f"demo={corpus}", "--model", "repeat-content", "--resolution", "64"]
    arguments += ["--metrics", "psnr,ssim", "--out", str(tmp_path / "out"), "--pictures", "0"]
    ran = CliRunner().invoke(main, [*arguments, "--preset", "pexels-1k"])
    assert ran.exit_code == 0, ran.output
    assert "| repeat-content | none | 0 |" in ran.stdout
    assert "Protocol paper" in ran.stdout
    ran = CliRunner().invoke(main, [*arguments, "--model", "reducio-ft4-fs32"])
    assert ran.exit_code == 1
    assert "needs its weights" in ran.output
