"""The numbers are those of the published implementation, on weights made by rule.

tests/golden holds excerpts; with REDUCIO_SHARED set (or the reference beside the repository) the
whole reference is compared as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reducio_latents.vae import ReducioVAE, ReducioVAEConfig, Tiling
from reducio_latents.vae.model import centre_image
from reducio_latents.vae.rule_weights import rule_weight
from reducio_latents.vae.weights import expected_shapes

GOLDEN = Path(__file__).parent / "golden"
SPEC = json.loads((GOLDEN / "reducio_vae.json").read_text())
MOMENTS, PIXELS = 5e-6, 1e-5
"""Relative, 2-norm: what the roundings of float32 add up to on any CPU, in latents and in
reconstructions. A wrong epsilon already hides under 1e-4."""

_here = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("REDUCIO_SHARED", _here.parent / "shared")) / "reference"
needs_reference = pytest.mark.skipif(not SHARED.is_dir(), reason="no reference folder")
needs_time = pytest.mark.skipif("REDUCIO_SHARED" not in os.environ, reason="a minute of CPU")

SLOW_TO_DECODE = set() if "REDUCIO_SHARED" in os.environ else {"narrow_ft4_tiled_128x96"}
WHOLE = {
    **{name: case for name, case in SPEC["cases"].items() if not name.startswith("own")},
    "narrow_ft4_tiled128_288x160": {
        "width": 32,
        "stride": 4,
        "seed": 12,
        "shape": [1, 3, 16, 288, 160],
        "tile_px": 128,
    },
}


def rule_made(stride: int, width: int) -> ReducioVAE:
    config = ReducioVAEConfig(
        temporal_stride=stride, width=width, content_width=width, decoder_width=width
    )
    model = ReducioVAE(config)
    model.load_state_dict({k: rule_weight(k, t.shape) for k, t in model.state_dict().items()})
    return model


def rule_made_video(seed: int, shape: list[int]) -> Tensor:
    noise = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(np.tanh(0.7 * noise)).float()


def run(case: dict[str, Any], *, decode: bool = True) -> dict[str, Tensor]:
    model = rule_made(case["stride"], case["width"])
    video = rule_made_video(case["seed"], case["shape"])
    tiling = Tiling(tile_px=case["tile_px"]) if "tile_px" in case else None
    with torch.inference_mode():
        posterior = model.encode(video, tiling)
        z = model.final_latents(posterior)
        found = {"mean": posterior.mean, "logvar": posterior.logvar, "z": z}
        if decode:
            found["rec"] = model.decode(z, centre_image(video), tiling)
    return found


def distance(found: Tensor, wanted: np.ndarray[Any, Any]) -> float:
    assert tuple(found.shape) == wanted.shape
    return float(np.linalg.norm(found.numpy() - wanted) / np.linalg.norm(wanted))


def assert_near(far: dict[str, float]) -> None:
    assert all(x < (PIXELS if key == "rec" else MOMENTS) for key, x in far.items()), far


@pytest.mark.parametrize("name", SPEC["cases"])
def test_latents_and_reconstructions_are_the_reference_ones(name: str) -> None:
    # Six tiles' worth of narrow decoding takes seconds; the case of width 8 decodes tiles too.
    found = run(SPEC["cases"][name], decode=name not in SLOW_TO_DECODE)
    if "rec" in found:
        found["rec"] = found["rec"].flatten()[:: SPEC["rec_step"]]
    with np.load(GOLDEN / "reducio_vae.npz") as golden:
        far = {key: distance(x, golden[f"{name}.{key}"]) for key, x in found.items()}
    assert_near(far)


@pytest.mark.parametrize(("name", "stride"), [("ft4", 4), ("ft2", 2)])
def test_keys_and_shapes_are_the_published_ones(name: str, stride: int) -> None:
    shapes = expected_shapes(ReducioVAEConfig(temporal_stride=stride))
    lines = sorted(f"{key} {shape}\n" for key, shape in shapes.items())
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert {"keys": len(shapes), "sha256": digest} == SPEC["published"][name]


@pytest.mark.parametrize(
    ("stride", "encoder", "decoder"), [(4, 141.93, 261.03), (2, 137.22, 261.04)]
)
def test_parameters_count_as_the_paper_says(stride: int, encoder: float, decoder: float) -> None:
    shapes = expected_shapes(ReducioVAEConfig(temporal_stride=stride))

    def millions(part: str) -> float:
        sizes = [np.prod(shape) for key, shape in shapes.items() if key.startswith(f"{part}.")]
        return round(sum(map(int, sizes)) / 1e6, 2)

    assert [millions(p) for p in ("encoder_3d", "encoder_2d", "decoder")] == [
        encoder,
        34.13,
        decoder,
    ]


@needs_reference
@pytest.mark.parametrize(
    ("name", "stride", "width"), [("ft4_fs32", 4, 128), ("ft2_fs32", 2, 128), ("narrow_ft4", 4, 32)]
)
def test_keys_and_shapes_are_those_of_the_reference_list(
    name: str, stride: int, width: int
) -> None:
    listed = json.loads((SHARED / f"state_dict_{name}.json").read_text())
    config = ReducioVAEConfig(
        temporal_stride=stride, width=width, content_width=width, decoder_width=width
    )
    kept = {key: tuple(s) for key, s in listed.items() if not key.startswith("loss.")}
    assert len(listed) == 535
    assert expected_shapes(config) == kept


@needs_time
@needs_reference
def test_every_module_gives_what_the_reference_one_gave() -> None:
    listed = json.loads((SHARED / "narrow_ft4_64_modules.json").read_text())
    model = rule_made(4, 32)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = output.clone() if isinstance(output, Tensor) else output[0].clone()

        return hook

    for name, module in model.named_modules():
        if name in listed and not name.endswith(("norm1", "norm2", "norm_out")):
            module.register_forward_hook(keep(name))
        elif name.endswith("norm2"):  # ours has the activation in it, as the reference's dropout
            module.register_forward_hook(keep(name.removesuffix("norm2") + "dropout"))
    with torch.inference_mode():
        model(rule_made_video(7, [1, 3, 16, 64, 64]))
    assert len(seen) > 200
    for name, output in seen.items():
        assert list(output.shape) == listed[name]["shape"], name
        assert float(output.mean()) == pytest.approx(listed[name]["mean"], abs=1e-4), name
        assert float(output.std()) == pytest.approx(listed[name]["std"], rel=1e-4), name


@needs_time
@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_reference_holds(name: str) -> None:
    found = run(WHOLE[name])
    with np.load(SHARED / f"{name}.npz") as golden:
        if found["rec"].shape != golden["rec"].shape:
            found["rec"] = found["rec"][..., ::2, ::2]
        far = {key: distance(x, golden[key]) for key, x in found.items()}
    assert_near(far)
