"""LPIPS and FVD: the numbers of the reference code for given weights, and no number without."""

from __future__ import annotations

import hashlib
import math
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reducio_latents.core.choices import LpipsNet
from reducio_latents.errors import GeometryError, WeightsError
from reducio_latents.metrics import i3d as i3d_module
from reducio_latents.metrics.i3d import (
    FILE,
    I3D,
    PROGRAM_FILE,
    FVDNetwork,
    frechet_distance,
    frechet_of_features,
    load_i3d,
    pad_same,
)
from reducio_latents.metrics.lpips import BACKBONES, LPIPS, load_lpips
from reducio_latents.metrics.weights import MetricUnavailableError, hub_path


def peer_features(net: LpipsNet) -> nn.Sequential:
    """Build torchvision's `features` of AlexNet or VGG16 with small random weights."""
    torch.manual_seed(5)
    if net == "alex":
        return nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def save_backbone(features: nn.Sequential, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, path)
    return path


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_torchmetrics_with_the_same_backbone(
    net: LpipsNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchmetrics.functional.image.lpips as peer

    features = peer_features(net)
    monkeypatch.setattr(peer, "_get_tv_model_features", lambda *_, **__: features)
    theirs = peer._LPIPS(pretrained=True, net=net)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save_backbone(features, hub_path(BACKBONES[net].file))
    ours = load_lpips(net)
    x, y = torch.rand(2, 2, 3, 72, 64) * 2 - 1
    torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), atol=1e-6, rtol=1e-5)
    assert ours(x, x).abs().max() == 0
    assert (ours(x, y) > 0).all()


def test_lpips_without_weights_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        MetricUnavailableError, match=r"Download https://.*alexnet.*--lpips-weights"
    ):
        load_lpips("alex")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = save_backbone(peer_features("alex"), tmp_path / "alex.pth")
    with pytest.raises(WeightsError, match="does not hold the backbone"):
        load_lpips("vgg", other)
    text = tmp_path / "text.pth"
    text.write_text("no weights")
    with pytest.raises(WeightsError, match="not a weights file") as refused:
        load_lpips("vgg", text)
    assert "weights_only" not in str(refused.value)
    with pytest.raises(WeightsError, match="no such weights file"):
        load_lpips("vgg", tmp_path / "missing.pth")


def test_a_file_that_would_run_code_is_never_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    evil = tmp_path / "evil.pth"
    torch.save({"features.0.weight": Payload()}, evil)
    with pytest.raises(WeightsError, match="only running code could rebuild"):
        load_lpips("alex", evil)
    script = tmp_path / "i3d_torchscript.pt"
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("i3d/constants.pkl", b"")
    with pytest.raises(WeightsError, match="TorchScript archive, a program"):
        load_i3d(script)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_recognised(tmp_path: Path) -> None:
    script = tmp_path / "real.pt"
    program = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))  # type: ignore[no-untyped-call]
    torch.jit.save(program, script)
    with pytest.raises(WeightsError, match="TorchScript"):
        load_i3d(script)


class PixelMeans(nn.Module):
    """Stands for StyleGAN-V's program: its arguments, and means of what it was given."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        if not (rescale and resize and return_features):
            x = x * 0
        return x.mean((2, 3, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_one_program_that_is_known_by_its_hash_is_run_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = hub_path(PROGRAM_FILE)
    path.parent.mkdir(parents=True)
    program = torch.jit.script(PixelMeans())
    torch.jit.save(program, path)
    with pytest.raises(WeightsError, match="not one that is known here"):
        load_i3d()
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(i3d_module, "PROGRAM_SHA256", known)
    loaded = load_i3d()
    assert loaded.file == "i3d_torchscript.pt"
    video = torch.stack([torch.full((3, 9, 8, 8), value) for value in (-1.0, 1.0)])
    torch.testing.assert_close(loaded.features(video), torch.tensor([[0.0] * 3, [255.0] * 3]))
    with pytest.raises(GeometryError, match="at least 9 frames"):
        loaded.features(video[:, :, :8])


def test_lpips_does_not_learn() -> None:
    assert not any(parameter.requires_grad for parameter in LPIPS("alex").parameters())


@pytest.fixture(scope="module")
def i3d() -> I3D:
    torch.manual_seed(0)
    return I3D().eval()


def test_i3d_has_the_published_keys_and_sizes(i3d: I3D) -> None:
    state = i3d.state_dict()
    assert sum(p.numel() for p in i3d.parameters()) == 12_697_264
    assert state["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert state["Mixed_4f.b2b.conv3d.weight"].shape == (128, 32, 3, 3, 3)
    assert state["Mixed_5c.b3b.bn.running_var"].shape == (128,)
    assert state["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1)
    assert state["logits.conv3d.bias"].shape == (400,)
    assert "Mixed_3b.b3a" not in {key.rsplit(".", 2)[0] for key in state}


def test_fvd_features_of_a_clip_do_not_depend_on_its_batch(i3d: I3D) -> None:
    clips = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    together = FVDNetwork(i3d).features(clips)
    assert together.shape == (2, 400)
    torch.testing.assert_close(
        together[:1], FVDNetwork(i3d).features(clips[:1]), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(GeometryError, match="at least 9 frames"):
        FVDNetwork(i3d).features(clips[:, :, :8])


def test_i3d_loads_strictly_and_says_when_it_cannot_be_had(
    i3d: I3D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MetricUnavailableError, match="FVD is unavailable"):
        load_i3d()
    hub_path(FILE).parent.mkdir(parents=True)
    torch.save(i3d.state_dict(), hub_path(FILE))
    clips = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    loaded = load_i3d()
    assert loaded.file == "i3d_pretrained_400.pt"
    torch.testing.assert_close(loaded.features(clips), FVDNetwork(i3d).features(clips))
    short = {key: value for key, value in i3d.state_dict().items() if "Mixed_4b" not in key}
    torch.save(short, tmp_path / "short.pt")
    with pytest.raises(WeightsError, match=r"another architecture.*Mixed_4b") as refused:
        load_i3d(tmp_path / "short.pt")
    assert str(refused.value).count("Mixed_4b") == 5  # of 36


@pytest.mark.parametrize("size", [7, 8, 9, 14, 15])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (7, 2), (3, 1), (2, 2), (1, 1)])
def test_same_padding_gives_ceil_of_size_over_stride(size: int, kernel: int, stride: int) -> None:
    padded = pad_same(torch.zeros(1, 1, size, size, size), (kernel,) * 3, (stride,) * 3)
    out = torch.nn.functional.max_pool3d(padded, kernel, stride)
    assert out.shape[2:] == (math.ceil(size / stride),) * 3
    assert padded.shape[-1] - size <= kernel - 1


def random_cov(generator: torch.Generator, size: int) -> Tensor:
    root = torch.randn((size, size), generator=generator, dtype=torch.float64)
    return root @ root.T / size


def test_frechet_distance_of_known_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 16.0])
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 2.0])
    expected = 4 + sum((math.sqrt(x) - math.sqrt(y)) ** 2 for x, y in zip(a, b, strict=True))
    found = frechet_distance(mean_a, a.diag(), mean_b, b.diag())
    assert found == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_equals_torchmetrics_and_is_a_distance() -> None:
    from torchmetrics.image.fid import _compute_fid

    generator = torch.Generator().manual_seed(2)
    cov_a, cov_b = random_cov(generator, 12), random_cov(generator, 12)
    mean_a, mean_b = torch.randn((2, 12), generator=generator, dtype=torch.float64)
    ours = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert ours == pytest.approx(_compute_fid(mean_a, cov_a, mean_b, cov_b).item(), abs=1e-4)
    assert ours == pytest.approx(frechet_distance(mean_b, cov_b, mean_a, cov_a), abs=1e-9)
    assert frechet_distance(mean_a, cov_a, mean_a, cov_a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_features_fits_the_gaussians_and_works_with_few_clips() -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn((20_000, 3), generator=generator, dtype=torch.float64)
    b = torch.randn((20_000, 3), generator=generator, dtype=torch.float64) * 2 + 1
    assert frechet_of_features(a, b) == pytest.approx(3 + 3, rel=0.05)
    few = torch.randn((4, 30), generator=generator)
    assert frechet_of_features(few, few) == pytest.approx(0, abs=1e-5)
    with pytest.raises(GeometryError, match="at least 2 clips"):
        frechet_of_features(few[:1], few)
