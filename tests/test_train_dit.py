"""The DiT that `tools/train_dit.py` trains: it learns, resumes bit for bit, and makes videos."""

from __future__ import annotations

import csv
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.errors import ConfigError, StoreError, WeightsError
from reducio_latents.files import LocalFiles
from reducio_latents.store import open_store
from reducio_latents.store.meta import StoreMeta
from reducio_latents.upkeep.extraction.importing import import_reference
from tests import latent_stores
from tests.forked import Python
from tests.latent_stores import StoreSpec, write_store
from tests.train_ranks import start_ranks

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from dit.flow import draw, sample_euler, start_noise  # noqa: E402
from dit.model import Conditions, DiT, DiTConfig  # noqa: E402
from dit.records import LossTable  # noqa: E402
from dit.sample import Sampler  # noqa: E402
from dit.settings import RunSettings, SampleSettings, TrainSettings  # noqa: E402
from dit.train import TrainReport, train  # noqa: E402

VAE = "reducio-random:8"
BUCKET, LATENTS = "16x64x32", (16, 4, 2, 1)
COLUMNS = ("motion", "content_image", "caption", "text")
SIZES = {"width": 32, "depth": 2, "heads": 2}
SETTINGS = TrainSettings(
    batch_size=4,
    width=32,
    depth=2,
    heads=2,
    lr=4e-3,
    warmup_steps=5,
    latents="mean",
    val_fraction=0.3,
)
STEPS, KILLED_AT = 30, 13


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # The order of sums, so the last bits, depends on the number of threads.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def describe(spec: StoreSpec) -> StoreMeta:
    """Describe a synthetic store as one that a Reducio-VAE of random weights made."""
    meta, vae = synthetic_meta(spec), load_autoencoder(VAE)
    motion = replace(
        meta.columns["motion"],
        encoder=vae.name,
        config=dict(vae.config),
        row_shapes={BUCKET: (2 * LATENTS[0], *LATENTS[1:])},
        final=dict(vae.final_rule),
    )
    return replace(meta, columns={**meta.columns, "motion": motion})


synthetic_meta = latent_stores.meta_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight videos of two clips, with images and texts; one video is held out."""
    path = tmp_path_factory.mktemp("dit") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_stores, "meta_of", describe)
        write_store(path, videos=8, clips_per_video=2, buckets=(BUCKET,), columns=COLUMNS)
    return str(path)


def run(store: str, out: Path, steps: int, settings: TrainSettings = SETTINGS) -> TrainReport:
    how = RunSettings(steps=steps, checkpoint_every=5, log_every=1)
    report = train(store, out, settings, how)
    assert report is not None
    return report


def command(store: str, out: Path, steps: int) -> list[str]:
    """The command line of `run`."""
    options = {**SIZES, "batch-size": 4, "lr": 4e-3, "warmup-steps": 5, "latents": "mean"}
    options |= {"val-fraction": 0.3, "steps": steps, "checkpoint-every": 5, "log-every": 1}
    return [store, str(out), *(f"--{name}={value}" for name, value in options.items())]


def losses(out: Path) -> list[float]:
    with (out / "loss.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def saved(out: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = torch.load(out / "checkpoint.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def undisturbed(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run(store, out, STEPS)
    return out


def test_the_loss_falls_on_a_small_set(store: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, batch_size=8, width=64, dropout=0.0)
    report = run(store, tmp_path, 60, settings)
    assert report.step == 60
    assert report.last_loss < 0.9 * report.first_loss
    # Lower than the best that can be done knowing only that latents have unit variance: the
    # variance of e - x given (1 - t) x + t e.
    t = torch.sigmoid(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert report.last_loss < 0.95 * (1 / ((1 - t) ** 2 + t**2)).mean()
    assert 0 <= report.waiting_share < 1


def test_a_killed_run_ends_as_an_undisturbed_one(
    store: str, tmp_path: Path, undisturbed: Path
) -> None:
    words = [TOOLS / "train_dit.py", *command(store, tmp_path, STEPS)]
    process = Python(words, os.environ | {"OMP_NUM_THREADS": "1"})
    deadline_s = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline_s:
        if (tmp_path / "loss.csv").exists() and len(losses(tmp_path)) >= KILLED_AT:
            process.kill()
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    written, kept = len(losses(tmp_path)), int(saved(tmp_path)["step"])  # type: ignore[call-overload]
    assert 0 < kept <= written < STEPS

    report = run(store, tmp_path, STEPS)
    assert report.step == STEPS
    assert (tmp_path / "loss.csv").read_bytes() == (undisturbed / "loss.csv").read_bytes()
    ours, theirs = saved(tmp_path), saved(undisturbed)
    for part in ("model", "average"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
    assert ours["loader"] == theirs["loader"]


def test_rows_after_the_checkpoint_and_torn_ones_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    table = LossTable(path, 0)
    for step in range(1, 13):
        table.add({"step": step, "epoch": 0, "loss": step / 3, "grad_norm": 1.0, "lr": 0.1})
        if step == 9:
            whole = path.read_bytes()
    with path.open("a") as file:
        file.write("1")  # of 13
    assert LossTable(path, 9).losses() == [step / 3 for step in range(1, 10)]
    assert path.read_bytes() == whole


def test_two_ranks_train_as_one_and_one_goes_on_from_there(
    store: str, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TOOLS))
    for process in start_ranks(["train_dit", *command(store, tmp_path, 7)], 2):
        assert process.wait() == 0, process.communicate()
    assert run(store, tmp_path, 12).step == 12
    assert losses(tmp_path) == pytest.approx(losses(undisturbed)[:12], abs=1e-4)


def test_samples_are_videos_of_the_held_out_clips(store: str, tmp_path: Path) -> None:
    samples = SampleSettings(every=2, count=2, steps=3)
    train(store, tmp_path, SETTINGS, RunSettings(steps=2, samples=samples))
    paths = sorted((tmp_path / "samples" / "step-00000002").glob("*.mp4"))
    assert len(paths) == 2
    for path in paths:
        with av.open(str(path)) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        # A label above; content image, stored and sampled clip side by side, with gaps.
        assert [frame.shape for frame in frames] == [(24 + 64, 3 * 32 + 2 * 4, 3)] * 16


def test_sampled_latents_are_finite_repeatable_and_follow_the_content(store: str) -> None:
    sampler = make_sampler(store)
    network = lively(DiT(DiTConfig(latent_channels=16, **CONDITIONED, **SIZES)))
    first = sampler.latents(network, 0)
    assert first.shape == (1, *LATENTS)
    assert torch.isfinite(first).all()
    assert torch.equal(sampler.latents(network, 0), first)
    assert sampler.held_out_loss(network) > 0

    sampler.clips[0]["content_image"] = 255 - sampler.clips[0]["content_image"]
    assert not torch.allclose(sampler.latents(network, 0), first)


CONDITIONED = {"content_channels": 3, "content_stride": 32, "text_width": 5}


def make_sampler(store: str, val_fraction: float = 0.3) -> Sampler:
    return Sampler(
        open_store(store),
        ("motion", "content_image", "text"),
        SampleSettings(count=2, steps=3),
        val_fraction=val_fraction,
        seed=0,
        device=torch.device("cpu"),
    )


def lively(network: DiT) -> DiT:
    """Give every weight a value, as training does; a fresh DiT predicts 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return network.eval()


def conditions(batch: int, height: int = 64, keep: bool = True, seed: int = 0) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(batch, 3, height, 32, generator=generator)
    text = torch.randn(batch, 4, 5, generator=generator)
    mask = torch.arange(4) < torch.arange(batch)[:, None] + 1
    return Conditions(content, text, mask, torch.full((batch,), keep))


def test_a_fresh_network_predicts_nothing_for_a_grid_of_any_size() -> None:
    network = DiT(DiTConfig(latent_channels=16, **CONDITIONED, **SIZES))
    for height in (32, 96):
        x = torch.randn(2, 16, 3, height // 32, 1)
        out = network(x, torch.rand(2), conditions(2, height))
        assert out.shape == x.shape
        assert not out.any()


def test_without_conditions_nothing_of_them_is_seen() -> None:
    network = lively(DiT(DiTConfig(latent_channels=16, **CONDITIONED, **SIZES)))
    x, time_B = torch.randn(2, *LATENTS), torch.rand(2)
    seen = [network(x, time_B, conditions(2, seed=seed)) for seed in (0, 1)]
    assert not torch.allclose(*seen)
    unseen = [network(x, time_B, conditions(2, seed=seed).without()) for seed in (0, 1)]
    assert torch.equal(*unseen)


def test_padding_of_text_is_not_seen() -> None:
    network = lively(DiT(DiTConfig(latent_channels=16, **CONDITIONED, **SIZES)))
    x, time_B, given = torch.randn(2, *LATENTS), torch.rand(2), conditions(2)
    assert given.text is not None
    assert given.text_mask is not None
    other = given.text.masked_fill(~given.text_mask[..., None], 9.0)
    padded = given._replace(text=other)
    torch.testing.assert_close(network(x, time_B, given), network(x, time_B, padded))
    changed = given._replace(text=given.text + 1)
    assert not torch.allclose(network(x, time_B, given), network(x, time_B, changed))


def test_a_patch_covers_latents_and_must_fit() -> None:
    network = lively(DiT(DiTConfig(latent_channels=3, patch=2, **SIZES)))
    alone = Conditions(None, None, None, torch.ones(1, dtype=torch.bool))
    x = torch.randn(1, 3, 2, 4, 6)
    assert network(x, torch.rand(1), alone).shape == x.shape
    with pytest.raises(ConfigError, match="4x5 have no whole patches of 2"):
        network(torch.randn(1, 3, 2, 4, 5), torch.rand(1), alone)


@pytest.mark.parametrize("steps", [1, 7])
def test_along_straight_lines_euler_is_exact(steps: int) -> None:
    data, noise = torch.randn(2, *LATENTS), start_noise((2, *LATENTS), seed=3, first=0)
    calls = []

    def velocity(x: Tensor, time: Tensor, given: Conditions) -> Tensor:
        calls.append(time)
        t = time.view(-1, 1, 1, 1, 1)
        return (x - data) / t if given.keep.all() else torch.zeros_like(x)

    alone = Conditions(None, None, None, torch.ones(2, dtype=torch.bool))
    found = sample_euler(velocity, noise, alone, steps=steps, guidance=1.0)
    torch.testing.assert_close(found, data)
    assert len(calls) == steps
    # Guidance of 0 is the way without conditions, which here stands still.
    still = sample_euler(velocity, noise, alone, steps=steps, guidance=0.0)
    torch.testing.assert_close(still, noise)


def test_a_sample_draws_the_same_on_any_rank() -> None:
    shape = (6, *LATENTS)
    known = {"seed": 1, "step": 9, "times": "logit-normal", "dropout": 0.5}
    whole = draw(shape, first=0, **known)  # type: ignore[arg-type]
    parts = [draw((3, *LATENTS), first=first, **known) for first in (0, 3)]  # type: ignore[arg-type]
    for value, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(value, torch.cat(halves))
    assert len(set(whole.time.tolist())) == 6
    assert not torch.equal(draw(shape, first=0, **known | {"step": 10}).noise, whole.noise)  # type: ignore[arg-type]


def test_times_and_dropout_are_distributed_as_they_say() -> None:
    known = {"seed": 0, "step": 0, "first": 0}
    uniform = draw((4000, 1), times="uniform", dropout=0.25, **known)
    assert uniform.time.quantile(torch.tensor([0.25, 0.75])).tolist() == pytest.approx(
        [0.25, 0.75], abs=0.03
    )
    assert (~uniform.keep).float().mean().item() == pytest.approx(0.25, abs=0.03)
    normal = torch.logit(draw((4000, 1), times="logit-normal", dropout=0.0, **known).time)
    assert [normal.mean().item(), normal.std().item()] == pytest.approx([0, 1], abs=0.05)


def test_bf16_trains(store: str, tmp_path: Path) -> None:
    report = run(store, tmp_path, 3, replace(SETTINGS, precision="bf16"))
    assert 0 < report.last_loss < 10


def test_other_settings_are_refused_by_name(store: str, undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match=r"depth is 3, was 2; lr is 0\.1, was 0\.004"):
        run(store, undisturbed, STEPS, replace(SETTINGS, lr=0.1, depth=3))


def test_a_damaged_checkpoint_is_named(store: str, tmp_path: Path, undisturbed: Path) -> None:
    whole = (undisturbed / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"checkpoint\.pt is damaged .* Remove it"):
        run(store, tmp_path, STEPS)


def test_a_finished_run_has_nothing_left_to_do(store: str, undisturbed: Path) -> None:
    before = (undisturbed / "checkpoint.pt").read_bytes()
    report = run(store, undisturbed, STEPS)
    assert (report.step, report.clips_per_s) == (STEPS, 0)
    assert (undisturbed / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("motion", "caption"), "--columns names caption"),
        (("content_image", "content_latent"), "Leave all but one out"),
    ],
)
def test_columns_that_condition_nothing_are_refused(
    store: str, tmp_path: Path, columns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(store, tmp_path, 1, replace(SETTINGS, columns=columns))


def test_it_trains_on_imported_samples(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    for number in range(4):
        rng = np.random.RandomState(number)
        z = rng.standard_normal((2, *LATENTS)).astype(np.float16)
        still = rng.standard_normal((2, 4, 8, 4)).astype(np.float16)
        values = {"z": z, "z_2d": still, "fps": np.array(16)}
        save_file(values, tmp_path / "z" / f"{number}.safetensors")
    import_reference(tmp_path / "z", LocalFiles(tmp_path / "store"))
    settings = replace(SETTINGS, latents="sample")
    report = run(str(tmp_path / "store"), tmp_path / "out", 2, settings)
    assert report.step == 2
    kept = saved(tmp_path / "out")["settings"]
    assert kept["columns"] == ("latents", "content_latent_sample")


def test_a_batch_that_is_too_large_is_refused_with_one_that_fits(
    store: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"global batch is 99 .* size of \d+ a rank or less\.$"):
        run(store, tmp_path, 1, replace(SETTINGS, batch_size=99))


def test_a_column_that_is_missing_is_named(store: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="content_latent"):
        run(store, tmp_path, 1, replace(SETTINGS, columns=("motion", "content_latent")))


def test_without_held_out_videos_there_are_no_samples(store: str) -> None:
    with pytest.raises(ConfigError, match=r"no clip can be held out .* Raise --val-fraction"):
        make_sampler(store, val_fraction=1e-6)
