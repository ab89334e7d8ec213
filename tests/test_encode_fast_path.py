"""Fast ways to encode: what they cost is small, measured, and written in the store."""

from __future__ import annotations

import gc
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from reducio_latents import autoencoders, load_autoencoder, open_store
from reducio_latents.autoencoders import Autoencoder
from reducio_latents.autoencoders.reducio import ReducioAutoencoder
from reducio_latents.cli import main
from reducio_latents.core.geometry import Bucket, aspect_buckets
from reducio_latents.encode import fast_path, registry
from reducio_latents.encode.columns import MotionColumn
from reducio_latents.encode.fast_path import (
    FastPathError,
    fast_path_error,
    fastest_batch,
    is_exact,
    made_up_clips,
    true_float32,
)
from reducio_latents.encode.gpu import BatchEncoder, input_sizes, raise_compile_limit
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.vae.blocks import Downsample
from reducio_latents.vae.norm import NormSiLU, fuse_norms
from reducio_latents.vae.tiling import Tiling
from tests.corpora import write_video
from tests.half_precision import SLACK, rounding
from tests.test_encode_flow import encode, files_of

MODEL = "reducio-random:8"
SMALL = Bucket(16, 32, 32)


@pytest.mark.parametrize(
    ("dtype", "layout", "loss_db"),
    [
        (torch.float32, torch.channels_last_3d, 0.001),
        (torch.bfloat16, torch.contiguous_format, 0.05),
        (torch.bfloat16, torch.channels_last_3d, 0.05),
    ],
)
def test_what_is_stored_by_a_fast_path_stays_near_float32(
    dtype: torch.dtype, layout: torch.memory_format, loss_db: float
) -> None:
    frames, exact = made_up_clips(2, SMALL), load_autoencoder(MODEL)

    def error(fast: Autoencoder) -> FastPathError:
        return fast_path_error(BatchEncoder(fast).launch(frames)(), exact, frames, decode=True)

    found = error(load_autoencoder(MODEL, dtype=dtype, memory_format=layout, parts="encoder"))
    rounded = load_autoencoder(MODEL)
    assert isinstance(rounded, ReducioAutoencoder)
    rounded.model = rounding(rounded.model, dtype)
    # Rows are stored as float16 either way, whose step is 2**-11 of a value.
    assert 0 < found.relative < SLACK * error(rounded).relative
    assert found.psnr_loss_db is not None
    assert abs(found.psnr_loss_db) < loss_db


def test_the_measure_sees_numbers_that_are_wrong() -> None:
    frames, exact = made_up_clips(2, SMALL), load_autoencoder(MODEL)
    moments = BatchEncoder(exact).launch(frames)()
    found = fast_path_error(moments[::-1].copy(), exact, frames, decode=True)
    assert found.relative > 0.1
    doubled = fast_path_error(2 * moments, exact, frames, decode=False)
    assert doubled.relative == pytest.approx(1, abs=1e-3)
    assert doubled.psnr_loss_db is None


def test_norm_and_activation_in_place_are_those_that_autograd_records() -> None:
    torch.manual_seed(0)
    layer, x = NormSiLU(32), torch.randn(2, 32, 4, 8, 8)
    nn.init.normal_(layer.weight)
    recorded = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), recorded)
        assert torch.equal(layer(x), recorded)  # x itself is as it was


def test_tf32_is_off_while_the_exact_numbers_are_made_and_as_before_after_that() -> None:
    before = torch.backends.cudnn.allow_tf32
    with true_float32():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
    plain = load_autoencoder(MODEL, parts="encoder").precision
    assert is_exact(plain)
    for other in ({"dtype": "bfloat16"}, {"compiled": "norms"}, {"tf32": True}):
        assert not is_exact({**plain, **other})


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {"float32_error"}),
        ({"check_every": 1}, {"float32_error", "float32_psnr_loss_db"}),
        ({"dtype": "float32"}, set()),
    ],
)
def test_the_store_says_what_its_precision_costs(
    settings: dict[str, Any], kept: set[str], tmp_path: Path
) -> None:
    write_video(tmp_path / "corpus" / "v.mp4", 1.1, seed=1)
    settings = {"dtype": "bfloat16", "columns": ("motion",), **settings}
    encode(tmp_path / "corpus", tmp_path / "store", **settings)
    measured = open_store(tmp_path / "store").meta.columns["motion"].measured
    assert set(measured) == kept
    if "float32_error" in kept:
        assert 0 < measured["float32_error"] < 0.1
    assert abs(measured.get("float32_psnr_loss_db", 0)) < 0.1


def test_what_was_measured_stays_when_a_run_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "corpus" / "v.mp4", 1.1, seed=1)
    settings: dict[str, Any] = {"dtype": "bfloat16", "columns": ("motion",)}
    encode(tmp_path / "corpus", tmp_path / "store", **settings)
    before = files_of(tmp_path / "store")
    monkeypatch.setattr(MotionColumn, "measure", None)  # it must not be asked again
    encode(tmp_path / "corpus", tmp_path / "store", **settings)
    assert files_of(tmp_path / "store") == before


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with bfloat16, in whose stead the CPU computes."""

    def load(*args: Any, device: str, **settings: Any) -> Autoencoder:
        assert device == "cuda"
        return load_autoencoder(*args, **settings)

    monkeypatch.setattr(EncodeOptions, "torch_device", "cuda")
    monkeypatch.setattr(EncodeOptions, "resizes_on_device", False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(autoencoders, "load_autoencoder", load)
    monkeypatch.setattr(fast_path, "batch_sizes", lambda bucket: [1, 2])


def precision_of(store: Path) -> tuple[str, dict[str, float]]:
    motion = open_store(store).meta.columns["motion"]
    return motion.config["precision"]["dtype"], motion.measured


@pytest.mark.usefixtures("pretended_gpu")
def test_a_gpu_has_bfloat16_and_a_measured_batch_by_default_and_a_resumed_run_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "corpus" / "v.mp4", 3.1, seed=1)
    settings: dict[str, Any] = {"columns": ("motion",), "batch_size": "auto", "shard_rows": 2}
    encode(tmp_path / "corpus", tmp_path / "store", **settings)
    dtype, measured = precision_of(tmp_path / "store")
    assert dtype == "bfloat16"
    assert set(measured) == {"float32_error", "batch_size"}
    assert measured["batch_size"] in (1, 2)
    before = files_of(tmp_path / "store")
    (tmp_path / "store/commits/16x32x32/motion/000001.json").unlink()
    # Another machine would find another batch size, and has no bfloat16.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(MotionColumn, "measure", None)
    encode(tmp_path / "corpus", tmp_path / "store", **settings)
    assert files_of(tmp_path / "store") == before


@pytest.mark.usefixtures("pretended_gpu")
def test_bfloat16_that_is_too_far_off_is_not_used_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_video(tmp_path / "corpus" / "v.mp4", 1.1, seed=1)
    monkeypatch.setattr(registry, "MOST_ERROR", 1e-6)
    for asked, expected, said in (("auto", "float32", 1), ("bfloat16", "bfloat16", 0)):
        caplog.clear()
        store = tmp_path / asked
        encode(tmp_path / "corpus", store, columns=("motion",), batch_size=2, dtype=asked)
        assert precision_of(store)[0] == expected
        assert caplog.text.count("going on in float32") == said


def test_a_model_that_was_measured_does_not_outlive_its_column() -> None:
    model = load_autoencoder(MODEL, dtype=torch.bfloat16)
    column = MotionColumn(model, "bicubic", load_exact=lambda: load_autoencoder(MODEL))
    assert column.measure(SMALL) == column.measure(SMALL) != {}
    alive = weakref.ref(model)
    del model, column
    gc.collect()
    assert alive() is None


def test_the_fastest_batch_is_the_smallest_that_is_as_fast_and_fits() -> None:
    bucket, now = Bucket(16, 256, 256), [0.0]

    def times(seconds: dict[int, float]) -> int:
        def launch(frames: Tensor) -> Callable[[], None]:
            if len(frames) not in seconds:
                raise torch.OutOfMemoryError

            def wait() -> None:
                now[0] += seconds[len(frames)]

            return wait

        return fastest_batch(launch, bucket, lambda: now[0])

    assert times({8: 1.0, 16: 1.9, 32: 3.2, 64: 6.36}) == 32
    assert times({8: 1.0, 16: 1.9, 32: 4.2, 64: 9.0}) == 16
    assert times({8: 1.0}) == 8
    assert times({}) == 1
    assert [fast_path.batch_sizes(Bucket(16, side, side)) for side in (256, 1024, 4096)] == [
        [8, 16, 32, 64],
        [1, 2, 4],
        [1],
    ]


class Programs:
    """A backend of torch.compile that compiles nothing, and counts what it was given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("is_raised", [True, False])
def test_every_bucket_gets_its_program_though_there_are_more_than_the_compiler_allows(
    is_raised: bool,
) -> None:
    from torch._dynamo import config

    buckets, limit = aspect_buckets(1, 512), 8
    assert len(buckets) > limit
    model = load_autoencoder("reducio-random:8", parts="encoder", tiling=None)
    programs, network = Programs(), Downsample(3, (1, 2, 2))
    torch.compiler.reset()
    with config.patch(recompile_limit=limit, accumulated_recompile_limit=limit):
        if is_raised:
            raise_compile_limit(model, buckets)
        network.compile(backend=programs, dynamic=False)
        for bucket in [*buckets, *buckets]:
            network(torch.zeros(1, 3, bucket.frames, bucket.height, bucket.width))
    torch.compiler.reset()
    assert programs.count == (len(buckets) if is_raised else limit)


def test_of_tiled_buckets_the_sizes_of_the_tiles_count() -> None:
    tiled = load_autoencoder("reducio-random:8", tiling=Tiling(tile_px=64, overlap=0.25))
    buckets = [Bucket(16, 160, 96), Bucket(16, 64, 64)]
    sides = {(h, w) for h in (80, 80, 32) for w in (80, 32)} | {(64, 64)}
    assert input_sizes(tiled, buckets) == {(16, h, w) for h, w in sides}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_norm_and_activation_gives_the_numbers_of_the_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    layer, x = NormSiLU(32), torch.randn(1, 32, 4, 8, 8)
    # One program is compiled: none to find out what the CPU can do, none to compile headers ahead.
    plain = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    with torch.inference_mode(), config.patch(plain):
        expected = layer(x)
        fuse_norms(layer)
        found = layer(x)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_info_shows_what_was_measured_in_its_own_unit(tmp_path: Path) -> None:
    write_video(tmp_path / "corpus" / "v.mp4", 1.1, seed=1)
    settings: dict[str, Any] = {"dtype": "bfloat16", "check_every": 1}
    encode(tmp_path / "corpus", tmp_path / "store", columns=("motion",), **settings)
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "store")]).output
    assert re.search(r"float32 error +\d+\.\d\d%", shown)
    assert re.search(r"float32 psnr loss +-?\d\.\d{3} dB", shown)
