"""Fast ways to encode: what they cost is small, measured, and written in the store."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from reducio_latents import load_autoencoder, open_store
from reducio_latents.autoencoders import Autoencoder
from reducio_latents.autoencoders.reducio import ReducioAutoencoder
from reducio_latents.cli import main
from reducio_latents.core.geometry import Bucket, aspect_buckets
from reducio_latents.encode.columns import MotionColumn
from reducio_latents.encode.fast_path import (
    FastPathError,
    fast_path_error,
    is_exact,
    made_up_clips,
    true_float32,
)
from reducio_latents.encode.gpu import BatchEncoder, input_sizes, raise_compile_limit
from reducio_latents.vae.blocks import Downsample
from reducio_latents.vae.norm import NormSiLU, fuse_norms
from reducio_latents.vae.tiling import Tiling
from tests.corpora import write_video
from tests.half_precision import SLACK, rounding
from tests.test_encode_flow import encode, files_of

MODEL = "reducio-random:16"
SMALL = Bucket(16, 32, 32)


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "last"]
)
@pytest.mark.parametrize(("dtype", "loss_db"), [(torch.float32, 0.001), (torch.bfloat16, 0.05)])
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
