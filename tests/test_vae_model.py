"""ReducioVAE: what it takes, what it refuses, and what must not change its numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError, LatentsError, PixelError
from reducio_latents.vae import ReducioVAE, ReducioVAEConfig, Tiling
from reducio_latents.vae.blocks import ResidualBlock, SelfAttention
from reducio_latents.vae.decoder import ContentFusion
from reducio_latents.vae.model import PARTS, centre_image
from reducio_latents.vae.norm import fusible_norm_silu, norm_silu
from reducio_latents.vae.rule_weights import rule_weight
from reducio_latents.vae.weights import expected_shapes
from tests.half_precision import assert_as_near, rounding

NARROW = ReducioVAEConfig(width=8, content_width=8, decoder_width=8)
DIFFERENCES = replace(NARROW, target="difference")


def make(config: ReducioVAEConfig = NARROW) -> ReducioVAE:
    model = ReducioVAE(config)
    model.load_state_dict({k: rule_weight(k, t.shape) for k, t in model.state_dict().items()})
    return model


@pytest.fixture(scope="module")
def vae() -> ReducioVAE:
    return make().requires_grad_(False)


def video(batch: int = 1, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(batch + height + width)
    return torch.tanh(torch.randn(batch, 3, 16, height, width, generator=generator))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("stride", [2, 4])
def test_shapes_follow_the_geometry(stride: int) -> None:
    config = ReducioVAEConfig(
        temporal_stride=stride, width=8, content_width=16, decoder_width=24, latent_channels=5
    )
    model, clip = make(config), video(height=64)
    with torch.inference_mode():
        posterior = model.encode(clip)
        rec = model.decode(model.final_latents(posterior), centre_image(clip))
    assert posterior.mean.shape == posterior.logvar.shape
    assert posterior.mean.shape[1:] == config.geometry.latent_shape(16, 64, 32)
    assert rec.shape == clip.shape


def test_a_clip_alone_and_in_a_batch_gives_the_same(vae: ReducioVAE) -> None:
    clips = video(batch=3)
    together = vae.encode(clips)
    latents = vae.final_latents(together)
    decoded = vae.decode(latents, centre_image(clips))
    alone = vae.encode(clips[1:2])
    assert relative(together.mean[1:2], alone.mean) < 1e-5
    assert relative(latents[1:2], vae.final_latents(alone)) < 1e-5
    assert relative(decoded[1:2], vae.decode(latents[1:2], centre_image(clips[1:2]))) < 1e-5


def test_final_latents_are_normalised_per_clip_and_take_noise(vae: ReducioVAE) -> None:
    posterior = vae.encode(video(batch=2))
    noise = torch.randn_like(posterior.mean)
    for latents in (vae.final_latents(posterior), vae.final_latents(posterior, noise)):
        assert latents.flatten(1).mean(1).abs().max() < 1e-5
        assert (latents.flatten(1).std(1, correction=0) - 1).abs().max() < 1e-2
    assert not torch.equal(vae.final_latents(posterior), vae.final_latents(posterior, noise))


def test_the_log_variance_stays_in_range(vae: ReducioVAE) -> None:
    config = vae.config
    wild = make(config).requires_grad_(False)
    wild.quant_conv.weight.mul_(1e4)  # type: ignore[operator]
    logvar = wild.encode(video()).logvar
    assert logvar.min() == -30
    assert logvar.max() == 20


def test_the_content_image_is_the_centre_frame_and_matters(vae: ReducioVAE) -> None:
    clip = video()
    assert torch.equal(centre_image(clip), clip[:, :, 7])
    latents = vae.final_latents(vae.encode(clip))
    ours, other = vae.decode(latents, clip[:, :, 7]), vae.decode(latents, clip[:, :, 0])
    assert relative(ours, other) > 1e-3


def test_an_untrained_model_of_differences_repeats_the_content_image() -> None:
    model = make(DIFFERENCES).requires_grad_(False)
    for parameter in model.decoder.conv_out.parameters():
        parameter.zero_()
    clip = video(height=64)
    latents = model.final_latents(model.encode(clip))
    repeated = centre_image(clip).unsqueeze(2).expand_as(clip)
    assert torch.equal(model.decode(latents, centre_image(clip)), repeated)
    tiling = Tiling(tile_px=32)
    assert torch.equal(model.decode(latents, centre_image(clip), tiling), repeated)


def test_a_model_of_differences_encodes_what_moves_and_how_much() -> None:
    model = make(DIFFERENCES).requires_grad_(False)
    model.difference_scale.fill_(1)
    clip = video() / 4
    mean = model.encode(clip).mean
    still = torch.rand(1, 3, 1, *clip.shape[-2:]) / 2
    assert relative(model.encode(clip + still).mean, mean) < 1e-5
    assert relative(model.encode(2 * clip).mean, mean) > 1e-2
    louder = make(DIFFERENCES).requires_grad_(False)
    louder.difference_scale.fill_(2)
    assert relative(louder.encode(clip).mean, model.encode(2 * clip).mean) < 1e-5
    image = centre_image(clip)
    latents = model.final_latents(model.encode(clip))
    found = louder.decode(latents, image) - image.unsqueeze(2)
    assert relative(2 * found, model.decode(latents, image) - image.unsqueeze(2)) < 1e-4


def test_the_target_must_be_known() -> None:
    with pytest.raises(ConfigError, match="choose one of video, difference"):
        ReducioVAEConfig(target="residual")  # type: ignore[arg-type]


def test_half_precision_is_near_and_its_results_are_float32(vae: ReducioVAE) -> None:
    clip = video()
    half = make().requires_grad_(False).bfloat16()
    rounded = rounding(vae)
    exact, rough = vae.encode(clip), half.encode(clip.bfloat16())
    assert rough.mean.dtype == rough.logvar.dtype == torch.float32
    assert_as_near(rough.mean, exact.mean, rounded.encode(clip).mean)
    given = vae.final_latents(exact), centre_image(clip)
    decoded = half.decode(*given)
    assert decoded.dtype == torch.float32
    assert_as_near(decoded, vae.decode(*given), rounded.decode(*given))


def test_attention_in_channels_last_copies_nothing() -> None:
    layout, attention = torch.channels_last_3d, SelfAttention(3, 64)
    # Some of a CPU's convolutions change the layout.
    attention.q = attention.k = attention.v = attention.proj_out = nn.Identity()
    x = torch.randn(2, 64, 4, 8, 8)
    laid = x.contiguous(memory_format=layout)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        found = attention(laid)
    assert torch.allclose(found, attention(x), atol=1e-5)
    assert found.is_contiguous(memory_format=layout)
    assert not {"aten::copy_", "aten::clone"} & {row.key for row in seen.key_averages()}


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is asked of torch, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_forward_pass_pads_nothing_and_adds_once_a_block(layout: torch.memory_format) -> None:
    model, clip = make().requires_grad_(False).lay_out(layout), video(height=64)
    recorded = (
        model.encode(clip),
        model.decode(model.final_latents(model.encode(clip)), clip[:, :, 7]),
    )
    with torch.inference_mode(), Calls() as encoding:
        posterior = model.encode(clip)
    with torch.inference_mode(), Calls() as decoding:
        decoded = model.decode(model.final_latents(posterior), clip[:, :, 7])
    assert torch.equal(posterior.mean, recorded[0].mean)
    assert torch.equal(decoded, recorded[1])
    sums = (ResidualBlock, SelfAttention)
    blocks = sum(isinstance(module, sums) for module in model.encoder_3d.modules())
    assert encoding.found["add"] == blocks
    for calls in (encoding.found, decoding.found):
        assert calls["add"] > 0
        assert not {"pad", "constant_pad_nd"} & calls.keys()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_attention_gives_back_the_layout_that_it_got(layout: torch.memory_format) -> None:
    x = torch.randn(2, 64, 4, 6, 6).contiguous(memory_format=layout)
    assert SelfAttention(3, 64)(x).is_contiguous(memory_format=layout)
    fusion = ContentFusion(64, content_channels=32, steps=4)
    assert fusion(x, torch.randn(2, 32, 5, 5)).is_contiguous(memory_format=layout)


def test_layout_is_not_what_is_computed(vae: ReducioVAE) -> None:
    clip = video(height=64)
    other = make().requires_grad_(False).lay_out(torch.channels_last_3d)
    assert other.encoder_3d.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)  # type: ignore[operator]
    assert other.encoder_2d.conv_in.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    posterior = vae.encode(clip)
    assert relative(other.encode(clip).mean, posterior.mean) < 5e-5
    latents = vae.final_latents(posterior)
    decoded = vae.decode(latents, centre_image(clip))
    assert relative(other.decode(latents, centre_image(clip)), decoded) < 5e-5
    assert decoded.is_contiguous()


def test_every_trained_parameter_gets_a_gradient() -> None:
    model, clip = make(), video()
    rec, posterior = model(clip, torch.zeros(1, 16, 4, 1, 1))
    (rec.square().mean() + posterior.logvar.square().mean()).backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert [key for key, p in trained.items() if p.grad is None] == []
    idle = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert {key.rsplit(".", 2)[0] for key in idle} <= {
        "encoder_2d.mid.block_2",
        "encoder_2d",
    }


def test_gradients_do_not_depend_on_the_in_place_path() -> None:
    model, clip = make(), video()
    with torch.no_grad():
        fast = model.encode(clip)
    assert torch.equal(fast.mean, model.encode(clip).mean.detach())


def test_every_kind_of_block_compiles_without_graph_breaks(vae: ReducioVAE) -> None:
    decoder, encoder = vae.decoder, vae.encoder_3d
    x, content = torch.randn(1, 32, 4, 2, 2), torch.randn(1, 32, 4, 4)
    cases: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (encoder.down.get_submodule("3"), (torch.randn(1, 16, 16, 4, 4),)),
        (decoder.mid, (x, content)),
        (decoder.up.get_submodule("2"), (torch.randn(1, 32, 16, 2, 2), content)),
    ]
    for network, inputs in cases:
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), network(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_norm_that_can_be_fused_gives_the_same_and_keeps_the_layout(
    layout: torch.memory_format, dtype: torch.dtype, bound: float
) -> None:
    x = (3 + 5 * torch.randn(2, 24, 4, 6, 8)).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, 24).to(dtype)
    found = fusible_norm_silu(x, 8, weight, bias, 1e-6)
    expected = norm_silu(x.float(), 8, weight.float(), bias.float(), 1e-6)
    assert found.dtype == dtype
    assert found.stride() == x.stride()
    assert relative(found.float(), expected) < bound


def test_a_half_has_only_its_networks_and_says_so(vae: ReducioVAE) -> None:
    clip = video()
    state = vae.state_dict()
    halves = {}
    for parts in ("encoder", "decoder"):
        half = ReducioVAE(NARROW, parts)
        assert {name for name, _ in half.named_children()} == PARTS[parts]
        half.load_state_dict({k: t for k, t in state.items() if k.split(".")[0] in PARTS[parts]})
        halves[parts] = half
    posterior = halves["encoder"].encode(clip)
    assert torch.equal(posterior.mean.detach(), vae.encode(clip).mean)
    latents = vae.final_latents(vae.encode(clip))
    decoded = halves["decoder"].decode(latents, centre_image(clip))
    assert torch.equal(decoded.detach(), vae.decode(latents, centre_image(clip)))
    with pytest.raises(ConfigError, match="no decoder"):
        halves["encoder"].decode(latents, centre_image(clip))
    with pytest.raises(ConfigError, match="no encoder"):
        halves["decoder"].encode(clip)
    with pytest.raises(ConfigError, match="choose one of all, encoder, decoder"):
        ReducioVAE(NARROW, "everything")  # type: ignore[arg-type]


@settings(max_examples=12)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.sampled_from([2, 4]))
def test_any_multiple_of_eight_is_a_width(a: int, b: int, c: int, stride: int) -> None:
    config = ReducioVAEConfig(
        temporal_stride=stride, width=8 * a, content_width=8 * b, decoder_width=8 * c
    )
    assert len(expected_shapes(config)) == 512


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"width": 12}, "width is 12; use a multiple of 8, such as 8"),
        ({"content_width": 0}, "content_width is 0"),
        ({"decoder_width": 100}, "such as 96"),
        ({"temporal_stride": 8}, "has 2 or 4"),
        ({"latent_channels": 0}, "latent_channels must be >= 1"),
    ],
)
def test_a_config_cannot_exist_in_a_bad_state(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReducioVAEConfig(**settings_)


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        (torch.zeros(1, 3, 17, 32, 32), GeometryError, "has 17 frames.*16 at a time"),
        (torch.zeros(1, 3, 16, 40, 32), GeometryError, "height is 40.*height=32"),
        (torch.zeros(1, 3, 16, 32, 270), GeometryError, "width is 270.*width=256"),
        (torch.zeros(1, 3, 16, 0, 32), GeometryError, "height is 0.*height=32"),
        (torch.zeros(1, 16, 3, 32, 32), GeometryError, "must be .B, 3, T, H, W.*channel axis"),
        (torch.zeros(3, 16, 32, 32), GeometryError, "must be .B, 3, T, H, W"),
        (torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8), PixelError, "uint8.*127.5 - 1"),
        (torch.full((1, 3, 16, 32, 32), 255.0), PixelError, "255 to 255.*127.5 - 1"),
        (torch.full((1, 3, 16, 32, 32), -1.2), PixelError, "-1.2"),
        (torch.full((1, 3, 16, 32, 32), float("nan")), PixelError, "nan"),
    ],
)
def test_what_it_cannot_encode_is_refused_with_a_way_out(
    vae: ReducioVAE, clip: Tensor, error: type[LatentsError], message: str
) -> None:
    with pytest.raises(error, match=message):
        vae.encode(clip)
    assert issubclass(error, ValueError)


@pytest.mark.parametrize(
    ("latents", "content", "message"),
    [
        ((1, 16, 8, 1, 1), (1, 3, 32, 32), "another temporal stride"),
        ((1, 4, 4, 1, 1), (1, 3, 32, 32), r"h, w\). Those with 4 channels were made by another"),
        ((1, 4, 8, 1, 1), (1, 3, 32, 32), r"h, w\). Those with 4 channels were made by another"),
        ((16, 4, 1, 1), (1, 3, 32, 32), r"\(B, 16, 4, h, w\)\.$"),
        ((1, 4, 4, 1, 1), (1, 3, 32, 32), r"decodes \(B, 16, 4, h, w\)"),
        ((1, 16, 4, 1, 2), (1, 3, 32, 32), r"\(1, 3, 32, 64\)"),
        ((2, 16, 4, 1, 1), (1, 3, 32, 32), r"\(2, 3, 32, 32\)"),
        ((1, 16, 4, 1, 1), (1, 3, 16, 32, 32), r"must be \(B, 3, H, W\)"),
    ],
)
def test_latents_and_content_that_do_not_belong_together_are_refused(
    vae: ReducioVAE, latents: tuple[int, ...], content: tuple[int, ...], message: str
) -> None:
    with pytest.raises(GeometryError, match=message):
        vae.decode(torch.zeros(latents), torch.zeros(content))


def test_rounding_at_the_edge_of_the_range_is_no_error(vae: ReducioVAE) -> None:
    posterior = vae.encode(torch.full((1, 3, 16, 32, 32), 1.0004))
    assert isinstance(posterior, Posterior)
    assert torch.isfinite(posterior.mean).all()
