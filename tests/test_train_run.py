"""A whole run: it resumes bit for bit, keeps what it should, and says what went wrong."""

from __future__ import annotations

import csv
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from PIL import Image

from reducio_latents import load_autoencoder
from reducio_latents.errors import ConfigError, StoreError, TrainingError, WeightsError
from reducio_latents.files.lock import Lock, hold
from reducio_latents.files.source import VideoSource
from reducio_latents.train import checkpoint, loop
from reducio_latents.train.loop import TrainReport, train
from reducio_latents.train.options import RunOptions
from reducio_latents.train.settings import read_settings
from reducio_latents.video import get_backend
from tests.corpora import write_video
from tests.forked import Python
from tests.train_ranks import QUICK, Difference, start_ranks

SETTINGS = f"""
model: {{width: 8, content_width: 8, decoder_width: 8}}
data: {{size_px: 32, workers: 1, ahead: 2, validation_share: 0.25}}
loss: {{perceptual: none}}
adversarial: {{start_step: 2}}
train: {{steps: 4, batch_size: 1, lr: 1e-4, precision: {QUICK}, ema_decay: 0.9}}
validation: {{every_steps: 3, clips: 1}}
log: {{every_steps: 1, batch_frequency: 3, pictures: 1, tensorboard: false}}
checkpoint: {{every_steps: 1, keep_last: 2}}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(4):
        write_video(folder / f"{seed}.mp4", 2.1, seed=seed)
    return folder


@pytest.fixture(scope="module")
def config_file(corpus: Path) -> Path:
    path = corpus / "tiny.yaml"
    path.write_text(SETTINGS)
    return path


def run(config_file: Path, out: Path, *overrides: str, **options: Any) -> TrainReport:
    overrides = (f"data.corpus={config_file.parent}", *overrides)
    return train(read_settings(str(config_file), overrides), out, RunOptions(**options))


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    report = run(config_file, out)
    assert (report.step, report.checkpoint) == (4, out / "checkpoints" / "step-00000004")
    return out


def state_of(out: Path, step: int) -> dict[str, Any]:
    """Return everything in a checkpoint."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    weights = {n: (folder / n / "model.safetensors").read_bytes() for n in ("model", "ema")}
    return {**weights, **torch.load(folder / "training.pt", weights_only=True)}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def rows(path: Path, *without: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def test_a_run_writes_numbers_pictures_and_weights_that_load(finished: Path) -> None:
    numbers = rows(finished / "train.csv")
    assert [row["step"] for row in numbers] == ["1", "2", "3", "4"]
    assert [bool(row["disc"]) for row in numbers] == [False, False, True, True]
    assert all(0 <= float(row["waiting_share"]) <= 1 for row in numbers)
    scores = rows(finished / "validation.csv")
    assert [row["step"] for row in scores] == ["3", "4"]
    assert all(float(row["content_psnr_db"]) > 0 and row["clips"] == "1.0" for row in scores)
    with Image.open(finished / "pictures" / "training-00000003.png") as picture:
        assert picture.size == (8 * 32, 2 * 32)
    (clip,) = get_backend("pyav").read_clips(
        VideoSource(str(finished / "pictures" / "validation-00000003.mp4")),
        [0.0], frames=16, rate_fps=16.0,
    )  # fmt: skip
    assert not isinstance(clip, Exception)
    assert clip.frames[0].shape == (2 * 32, 32, 3)
    for name in ("model", "ema"):
        weights = finished / "checkpoints" / "step-00000004" / name
        vae = load_autoencoder("reducio", weights)
        assert vae.encode(torch.zeros(1, 3, 16, 32, 32)).mean.shape == (1, 16, 4, 1, 1)


def test_the_last_checkpoints_and_the_best_are_kept(finished: Path) -> None:
    kept = {path.name for path in (finished / "checkpoints").iterdir()}
    best = (finished / "checkpoints" / "best").resolve().name
    assert kept == {"step-00000003", "step-00000004", "best", best}
    scores = {row["step"]: float(row["psnr_db"]) for row in rows(finished / "validation.csv")}
    assert max(scores, key=lambda step: scores[step]) == str(int(best.removeprefix("step-")))


def command(config_file: Path, out: Path, *more: str) -> list[str]:
    corpus = f"data.corpus={config_file.parent}"
    return ["reducio_latents", "train", str(config_file), "--set", corpus, "--out", str(out), *more]


def start(arguments: Sequence[str]) -> Python:
    return Python(
        ["-m", *arguments], os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    )


def wait_for(found: Any, process: Python) -> None:
    end = time.monotonic() + 600
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def test_a_run_killed_at_any_moment_continues_bit_for_bit(
    config_file: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(command(config_file, out))
    log = out / "train.csv"
    wait_for(lambda: log.exists() and "\n2," in log.read_text(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "running.json").is_file()  # nobody could take it away; the dead hold nothing
    (out / "checkpoints" / ".step-00000099.partial").mkdir()  # as if it was killed while saving
    run(config_file, out)
    assert not [*(out / "checkpoints").glob(".*")]
    assert_same(state_of(out, 4), state_of(finished, 4))
    timings = ("clips_per_s", "waiting_share")
    assert rows(log, *timings) == rows(finished / "train.csv", *timings)


def test_two_runs_in_one_folder_are_one_too_many(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(command(config_file, out, "--set", "train.steps=100000"))
    wait_for(lambda: checkpoint.checkpoints(out / "checkpoints"), process)
    holder = rf"training since \d{{4}}-\d\d-\d\d .*process {process.pid} on {platform.node()}"
    with pytest.raises(StoreError, match=holder) as refused:
        run(config_file, out)
    assert "\n" not in str(refused.value)
    run(config_file, out, eval_only=True)  # writes nothing that a run reads
    process.terminate()
    output = "".join(process.communicate())
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by a signal" in output, output
    assert not (out / "running.json").exists()


def test_a_run_that_lost_its_folder_to_another_saves_nothing_more(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    held: list[Lock] = []

    @contextmanager
    def watched(*place: Any) -> Iterator[Lock]:
        with hold(*place, beat_s=1e6) as lock:  # beats in between would race with the other
            held.append(lock)
            yield lock

    def lose(line: str) -> None:
        if line.startswith("step 3"):  # as if it had been suspended for long, and another came
            (out / "running.json").write_text("{}")
            held[0].beat()

    monkeypatch.setattr(loop, "hold", watched)

    with pytest.raises(StoreError, match="was taken over by another process"):
        run(config_file, out, tell=lose)
    assert len(checkpoint.checkpoints(out / "checkpoints")) == 2
    assert (out / "running.json").read_text() == "{}"  # the other's


def test_a_run_that_is_told_to_end_while_it_probes_lets_its_folder_go(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any, on_probe: Callable[[int, int], None], **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        on_probe(1, 4)

    monkeypatch.setattr(loop, "make_split", ended)
    with pytest.raises(TrainingError, match=r"before the first step.*continues from the start"):
        run(config_file, tmp_path)
    assert not (tmp_path / "running.json").exists()


def test_a_run_that_is_told_to_end_saves_first(config_file: Path, tmp_path: Path) -> None:
    def end(line: str) -> None:
        if line.startswith("step 2"):  # the first validation
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what ranks got as well

    often = ("validation.every_steps=2", "train.steps=1000", "checkpoint.every_steps=1000")
    with pytest.raises(TrainingError, match="stopped by a signal after step 2") as caught:
        run(config_file, tmp_path / "out", *often, tell=end)
    saved = tmp_path / "out" / "checkpoints" / "step-00000002"
    assert f"continues from {saved}" in str(caught.value)
    assert saved.is_dir()


def test_a_rank_that_dies_ends_the_run_and_fewer_ranks_continue_its_order(
    config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("adversarial.discriminators=[]", "validation.every_steps=100000")
    words = [word for override in options for word in ("--set", override)]
    ranks = start_ranks(command(config_file, out, *words, "--set", "train.steps=100000"), 2)
    wait_for(lambda: checkpoint.checkpoints(out / "checkpoints"), ranks[0])
    ranks[1].kill()
    output = "".join(ranks[0].communicate())
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    assert "another process of this run is gone (" in output, output
    assert ".cc:" not in output
    newest = checkpoint.checkpoints(out / "checkpoints")[-1]
    assert f"The same command continues from {newest}" in output

    step = int(newest.name.removeprefix("step-")) + 1
    run(config_file, out, *options, f"train.steps={step}", "train.accumulate=2")
    epochs = [float(row["epoch"]) for row in rows(out / "train.csv")]
    assert epochs == pytest.approx([n * 2 / 6 for n in range(1, step + 1)])  # 2 of 6 clips a step


def test_ranks_whose_first_one_fails_say_so_in_words(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(SETTINGS)
    (tmp_path / "0.mp4").write_text("no video")
    ranks = start_ranks(command(config, tmp_path / "out"), 2)
    first, second = ("".join(rank.communicate()) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "leaves no clip for the training split" in first
    assert "another process of this run is gone" in second
    assert "Traceback" not in first + second


def test_the_same_weights_are_measured_alike_by_eval_only(
    config_file: Path, finished: Path, tmp_path: Path
) -> None:
    last = rows(finished / "validation.csv")[-1]
    weights = finished / "checkpoints" / "step-00000004" / "ema"
    report = run(config_file, tmp_path / "other", pretrained=weights, eval_only=True)
    assert report.scores is not None
    for name, value in report.scores.items():
        assert value == pytest.approx(float(last[name]), rel=1e-6)
    assert not (tmp_path / "other" / "train.csv").exists()
    assert (tmp_path / "other" / "evaluation.json").exists()
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        run(config_file, tmp_path / "empty", eval_only=True)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out = torch.save, tmp_path / "out"

    def full(state: dict[str, Any], file: IO[bytes]) -> None:
        if state["step"] == 1:
            save(state, file)
            return
        with Path("/dev/full").open("wb") as disk:
            save(state, disk)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"cannot save .*No space left") as caught:
        run(config_file, out)
    assert f"continues from {out}/checkpoints/step-00000001" in str(caught.value)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_that_leads_to_no_number_is_told_from_the_one_before(
    config_file: Path, tmp_path: Path
) -> None:
    run(config_file, tmp_path, "train.steps=2", "adversarial.discriminators=[]")
    with pytest.raises(TrainingError, match=r"step 4: total.* not finite; nothing") as caught:
        run(config_file, tmp_path, "train.lr=1e30", "adversarial.discriminators=[]")
    saved = tmp_path / "checkpoints"
    assert f"continues from {saved}/step-00000003" in str(caught.value)
    assert f"remove that folder to continue from {saved}/step-00000002" in str(caught.value)


def test_a_gpu_that_is_too_small_is_answered_with_what_to_do(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."
        )

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(
        TrainingError, match=r"allocate 2\.00 GiB\. Set train\.checkpointing=true.* from the start"
    ):
        run(config_file, tmp_path)


def test_a_folder_of_another_model_is_refused(config_file: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.width is 16, was 8"):
        run(config_file, finished, "model.width=16")


def test_a_run_that_never_came_to_train_may_be_given_other_settings(
    config_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no bucket fills a batch of 50"):
        run(config_file, tmp_path, "train.batch_size=50", "data.size_px=64")
    report = run(config_file, tmp_path, "train.steps=1", "data.validation_share=0.0")
    assert report.step == 1
    assert read_settings(str(tmp_path / "settings.yaml")).data.size_px == 32


def test_an_evaluation_leaves_the_settings_of_the_run_alone(
    config_file: Path, finished: Path
) -> None:
    before = (finished / "settings.yaml").read_bytes()
    run(config_file, finished, "validation.batch_size=2", eval_only=True)
    assert (finished / "settings.yaml").read_bytes() == before


def test_lpips_weights_serve_the_validation_where_the_loss_does_without(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "load_lpips", lambda *_: Difference())
    run(config_file, tmp_path, "train.steps=1", lpips_weights=Path("vgg16.pth"))
    assert rows(tmp_path / "train.csv")[0]["lpips"] == ""
    assert float(rows(tmp_path / "validation.csv")[0]["lpips"]) > 0


def test_a_damaged_checkpoint_is_named(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(config_file, out, "train.steps=1", "data.validation_share=0.0")
    path = out / "checkpoints" / "step-00000001" / "training.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"training\.pt is damaged .*Remove the folder"):
        run(config_file, out, "data.validation_share=0.0")


def test_lpips_without_weights_says_where_they_come_from(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"vgg16.*--set loss\.perceptual=none"):
        run(config_file, tmp_path / "out", "loss.perceptual=vgg")
