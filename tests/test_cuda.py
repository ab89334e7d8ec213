"""What only a GPU can show. Without one these tests are skipped.

Most need torch and numpy alone; those of stores and videos are skipped where a library is missing.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.core.choices import Compile
from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.fast_path import fast_path_error, made_up_clips
from reducio_latents.encode.gpu import BatchEncoder, DeviceFit
from reducio_latents.vae import norm
from reducio_latents.vae.norm import NormSiLU, takes_triton
from reducio_latents.video.pixels import fit_clip
from reducio_latents.video.planes import PlaneLayout, fit_packed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
MODEL = "reducio-random:32"
BUCKET = Bucket(16, 64, 64)
BFLOAT16: dict[str, Any] = {"dtype": torch.bfloat16, "memory_format": torch.channels_last_3d}


@pytest.fixture
def libraries() -> None:
    """Skip where one is missing that writes videos and stores."""
    for name in ("av", "google_crc32c", "pyarrow", "webdataset", "zarr"):
        pytest.importorskip(name)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_frames_are_resized_to_the_same_bits_as_on_the_cpu(mode: str) -> None:
    fit, bucket = DeviceFit(GPU), Bucket(4, 256, 256)
    for height, width in [(720, 1280), (1080, 608), (200, 200), (256, 256)]:
        frames = noise(4, height, width, 3)
        assert torch.equal(fit(frames, bucket, mode), fit_clip(frames, bucket, mode))
        layout = PlaneLayout(height, width, 2, 2, matrix=1, full_range=False)
        planes = noise(4, layout.size)
        on_cpu = fit_packed(planes, layout, bucket, mode)
        assert torch.equal(fit(planes, bucket, mode, layout), on_cpu)


def test_batches_on_their_way_at_once_do_not_mix() -> None:
    encoder = BatchEncoder(load_autoencoder(MODEL, device=GPU, parts="encoder", **BFLOAT16))
    sizes = [(8, 64), (3, 96), (8, 64), (1, 64), (8, 64), (2, 96), (8, 64)]
    batches = [noise(n, 16, 64, side, 3, seed=i) for i, (n, side) in enumerate(sizes)]
    alone = [encoder.launch(frames)() for frames in batches]
    waits = [encoder.launch(frames) for frames in batches]
    for expected, wait in zip(alone, waits, strict=True):
        np.testing.assert_array_equal(wait(), expected)
    busy_s = encoder.take_busy_s()
    assert busy_s is not None
    assert busy_s > 0


@pytest.mark.parametrize(
    ("dtype", "layout", "compile", "error"),
    [
        (torch.float32, torch.contiguous_format, "none", 5e-3),  # TF32
        (torch.bfloat16, torch.contiguous_format, "none", 3e-2),
        (torch.bfloat16, torch.channels_last_3d, "none", 3e-2),
        (torch.bfloat16, torch.channels_last_3d, "norms", 3e-2),
    ],
)
def test_a_fast_path_stays_near_float32(
    dtype: torch.dtype, layout: torch.memory_format, compile: Compile, error: float
) -> None:
    frames, exact = made_up_clips(2, BUCKET), load_autoencoder(MODEL, device=GPU)
    fast = load_autoencoder(
        MODEL, device=GPU, dtype=dtype, memory_format=layout, compile=compile, parts="encoder"
    )
    found = fast_path_error(BatchEncoder(fast).launch(frames)(), exact, frames, decode=True)
    assert 0 < found.relative < error
    assert found.psnr_loss_db is not None
    assert abs(found.psnr_loss_db) < 0.05


def test_float32_on_the_gpu_gives_the_numbers_of_the_cpu() -> None:
    frames = made_up_clips(2, BUCKET)
    moments = BatchEncoder(load_autoencoder(MODEL)).launch(frames)()
    exact = load_autoencoder(MODEL, device=GPU)
    # Rounded to float16, as stored.
    assert fast_path_error(moments, exact, frames, decode=False).relative < 1e-3


def test_a_clip_gets_the_same_latents_alone_and_in_any_batch() -> None:
    encoder = BatchEncoder(load_autoencoder(MODEL, device=GPU, parts="encoder", **BFLOAT16))
    frames = made_up_clips(8, BUCKET)
    together = encoder.launch(frames)().astype(np.float32)
    for size in (1, 3):
        parts = [encoder.launch(part)() for part in frames.split(size)]  # type: ignore[no-untyped-call]
        found = np.concatenate(parts).astype(np.float32)
        assert np.linalg.norm(found - together) / np.linalg.norm(together) < 2e-2


def test_a_batch_beyond_the_gpus_memory_is_cut_until_it_fits() -> None:
    autoencoder = load_autoencoder(MODEL, device=GPU, parts="encoder", **BFLOAT16)
    frames = noise(16, 16, 128, 128, 3)
    expected = BatchEncoder(autoencoder).launch(frames)()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    BatchEncoder(autoencoder).launch(frames[:4])()
    total = torch.cuda.get_device_properties(GPU).total_memory
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.5 * torch.cuda.max_memory_allocated() / total)
        encoder = BatchEncoder(autoencoder)
        found = encoder.launch(frames)()
        limit = encoder.batch_limit(frames.shape[1:])
        again = encoder.launch(frames)()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert limit is not None
    assert limit < 16
    np.testing.assert_array_equal(found, again)
    error = np.linalg.norm(found.astype(np.float32) - expected.astype(np.float32))
    assert error / np.linalg.norm(expected.astype(np.float32)) < 2e-2


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_a_run_on_a_gpu_is_whole_and_gives_the_same_bytes_twice(
    batch_size: int | str, tmp_path: Path
) -> None:
    from reducio_latents import open_store
    from reducio_latents.upkeep.verify import verify
    from tests.corpora import write_corpus
    from tests.test_encode_flow import encode, files_of

    corpus = write_corpus(tmp_path / "corpus")
    settings: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "batch_size": batch_size}
    report = encode(corpus, tmp_path / "store", **settings)
    assert (report.clips.found, report.clips.encoded) == (5, 4)
    store = open_store(tmp_path / "store")
    assert verify(store).ok
    assert 0 < store.meta.columns["motion"].measured["float32_error"] < 0.1
    encode(corpus, tmp_path / "other", **settings)
    assert files_of(tmp_path / "other") == files_of(tmp_path / "store")


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("latents", ["sample", "moments"])
def test_a_loader_brings_to_the_gpu_what_the_dataset_reads(latents: str, tmp_path: Path) -> None:
    from reducio_latents.dataset import LatentDataset, LatentLoader
    from tests.latent_stores import write_store

    columns = ("motion", "content_image", "caption")
    write_store(tmp_path / "store", videos=9, clips_per_video=4, columns=columns)
    options: dict[str, Any] = {"columns": columns, "batch_size": 4, "latents": latents}
    near = LatentDataset(tmp_path / "store", **options)
    far = LatentLoader(LatentDataset(tmp_path / "store", pin_memory=True, **options), device=GPU)
    count = 0
    for ours, theirs in zip(far, near, strict=True):
        count += 1
        assert ours["caption"] == theirs["caption"]
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert ours[name].device.type == "cuda"
                near_enough = 1e-5 if name == "latents" else 0  # drawn there, from the same noise
                assert torch.allclose(ours[name].cpu(), value, rtol=0, atol=near_enough)
    assert count == 9


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_training_on_a_gpu_resumes_bit_for_bit(precision: str, tmp_path: Path) -> None:
    from tests.corpora import write_video
    from tests.test_train_run import SETTINGS, assert_same, rows, run, state_of

    for seed in range(4):
        write_video(tmp_path / "corpus" / f"{seed}.mp4", 2.1, seed=seed)
    config = tmp_path / "corpus" / "tiny.yaml"
    config.write_text(SETTINGS)
    options = ("train.deterministic=true", f"train.precision={precision}", "checkpoint.keep_last=9")
    run(config, tmp_path / "whole", *options)
    begun = tmp_path / "begun" / "checkpoints"
    begun.mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "plan", begun.parent / "plan")
    shutil.copy(tmp_path / "whole" / "settings.yaml", begun.parent)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000002", begun / "step-00000002")
    run(config, begun.parent, *options)
    assert_same(state_of(begun.parent, 4), state_of(tmp_path / "whole", 4))
    losses = [float(row["total"]) for row in rows(tmp_path / "whole" / "train.csv")]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_by_hand_have_torchs_numbers_and_gradients_and_the_same_bits_again(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    layer = NormSiLU(128).to(GPU)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 128, 16, 40, 40, device=GPU, dtype=dtype) + 3
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    assert takes_triton(x)
    found = [layer(x) for _ in range(2)]
    assert torch.equal(*found)
    assert found[0].is_contiguous(memory_format=torch.channels_last_3d)
    wanted = [x, layer.weight, layer.bias]
    slopes = torch.autograd.grad(found[0].float().square().sum(), wanted)
    exact_x = x.detach().double().requires_grad_()
    exact_layer = deepcopy(layer).double()
    exact = exact_layer(exact_x.contiguous())
    parameters = [exact_x, exact_layer.weight, exact_layer.bias]
    exact_slopes = torch.autograd.grad(exact.square().sum(), parameters)
    assert not norm._problems
    for ours, theirs in zip([found[0], *slopes], [exact, *exact_slopes], strict=True):
        error = float((ours.double() - theirs).norm() / theirs.norm())
        assert error < 1e-5 + 4 * (dtype != torch.float32) * torch.finfo(dtype).eps
