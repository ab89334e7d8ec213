"""Weights files: what is read, what is refused and why, and that nothing in them is run."""

from __future__ import annotations

import pickle
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from reducio_latents.errors import WeightsError
from reducio_latents.vae import ReducioVAEConfig
from reducio_latents.vae.config import CodedTarget
from reducio_latents.vae.weights import (
    WeightsDigest,
    check_shapes,
    expected_shapes,
    infer_config,
    load_vae,
    open_state_dict,
    random_state_dict,
)

NARROW = ReducioVAEConfig(width=8, content_width=8, decoder_width=8)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    state = random_state_dict(NARROW)
    return {key: state.read(key) for key in state.shapes}


def lightning(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What a Lightning trainer saves beside the weights."""
    training = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(4)}
    state = {f"{prefix}{key}": t for key, t in {**tensors, **training}.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-5}]}
    return {"epoch": 3, "state_dict": state, "optimizer_states": [optimizer], "callbacks": {}}


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def digest(tensors: dict[str, Tensor]) -> str:
    found = WeightsDigest()
    for key, tensor in tensors.items():
        found.add(key, tensor)
    return found.hexdigest()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_lightning_checkpoint_loads_whole(
    tmp_path: Path, tensors: dict[str, Tensor], prefix: str, legacy: bool
) -> None:
    content = lightning(tensors, prefix)
    path = save(tmp_path / "a.ckpt", content, _use_new_zipfile_serialization=not legacy)
    state = open_state_dict(path)
    loaded = load_vae(state)
    assert state.dropped == 2
    assert loaded.model.config == NARROW
    assert loaded.weights_sha256 == digest(tensors)
    for key, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, tensors[key])


def test_every_format_gives_the_same_weights(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    paths = [
        save(tmp_path / "a.ckpt", lightning(tensors, "module.")),
        save(tmp_path / "plain.pt", tensors),
        tmp_path / "model.safetensors",
        tmp_path,
    ]
    assert {load_vae(open_state_dict(p)).weights_sha256 for p in paths} == {digest(tensors)}


def test_the_format_is_told_from_the_content_not_the_name(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "weights.ckpt")
    save(tmp_path / "weights", lightning(tensors))
    for path in tmp_path.iterdir():
        assert load_vae(open_state_dict(path)).weights_sha256 == digest(tensors)
    path = save(tmp_path / "weights.safetensors", lightning(tensors))
    with pytest.raises(WeightsError, match=r"torch checkpoint under the name.*Rename"):
        open_state_dict(path)


def test_float16_weights_load_and_are_other_weights(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    half = {key: tensor.half() for key, tensor in tensors.items()}
    save_file(half, tmp_path / "half.safetensors")
    state = open_state_dict(tmp_path / "half.safetensors")
    assert load_vae(state).model.dtype == torch.float16
    loaded = load_vae(state, dtype=torch.float32)
    assert loaded.model.dtype == torch.float32
    assert loaded.weights_sha256 == digest(half) != digest(tensors)


def test_the_digest_sees_keys_shapes_types_and_values_but_no_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2, 3)
    same = digest({"a": a, "b": b})
    assert digest({"b": b, "a": a}) == same
    others = [
        {"a": a, "c": b},
        {"a": a, "b": b.reshape(3, 2)},
        {"a": a, "b": b.half()},
        {"a": a + torch.eye(6)[2] * 1e-6, "b": b},
        {"a": a},
    ]
    assert len({same, *map(digest, others)}) == 6


def test_half_a_model_has_the_weights_and_the_digest_of_the_whole(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    state = open_state_dict(save(tmp_path / "a.ckpt", lightning(tensors)))
    whole, half = load_vae(state), load_vae(state, "encoder")
    assert half.weights_sha256 == whole.weights_sha256
    assert not any(key.startswith(("decoder", "encoder_2d")) for key in half.model.state_dict())
    for key, tensor in half.model.state_dict().items():
        assert torch.equal(tensor, tensors[key])


def test_a_model_outlives_its_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    model = load_vae(open_state_dict(path)).model
    path.write_bytes(bytes(path.stat().st_size))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[key])


widths = st.integers(1, 8).map(lambda n: 8 * n)


@settings(max_examples=10)
@given(
    widths,
    widths,
    widths,
    st.sampled_from([2, 4]),
    st.integers(1, 20),
    st.sampled_from(get_args(CodedTarget)),
)
def test_sizes_are_read_off_the_shapes(
    a: int, b: int, c: int, stride: int, latent: int, target: CodedTarget
) -> None:
    config = ReducioVAEConfig(
        temporal_stride=stride,
        width=a,
        content_width=b,
        decoder_width=c,
        latent_channels=latent,
        target=target,
    )
    shapes = expected_shapes(config)
    assert infer_config(shapes) == config
    check_shapes(shapes, config, "here")


def test_loading_is_strict_and_names_up_to_five_keys_of_a_kind(tensors: dict[str, Tensor]) -> None:
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    for key in [key for key in shapes if key.startswith("decoder.up.0.block_1")]:
        del shapes[key]
    shapes["decoder.extra"] = (1,)
    shapes["quant_conv.bias"] = (31,)
    with pytest.raises(WeightsError) as caught:
        check_shapes(shapes, NARROW, "x.ckpt")
    message = str(caught.value)
    assert "18 missing" in message
    assert message.count("decoder.up.0.block_1") == 5
    assert "and 13 more" in message
    assert "1 unexpected (decoder.extra)" in message
    assert "1 of another shape (quant_conv.bias (31,) instead of (32,))" in message


@pytest.mark.parametrize("change", ["drop", "add", "reshape"])
def test_a_state_dict_that_does_not_fit_exactly_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], change: str
) -> None:
    state = dict(tensors)
    if change == "drop":
        del state["encoder_2d.norm_out.bias"]  # takes no part, and still belongs
    elif change == "add":
        state["encoder_3d.mid.extra"] = torch.zeros(1)
    else:
        state["decoder.conv_out.bias"] = torch.zeros(4)
    with pytest.raises(WeightsError, match="does not fit"):
        load_vae(open_state_dict(save(tmp_path / "a.ckpt", {"state_dict": state})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"just some notes\nabout weights\n", "is text"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x00\x01\x02\x03" * 100, "something else"),
        (b"PK\x03\x04" + b"\x00" * 500, "damaged or cut short"),
        (b"\x80\x02" + b"\x00" * 20, "damaged or cut short"),
        (b"\xff" * 7 + b"\x00{" + b" " * 40, "damaged or cut short"),
    ],
)
def test_what_is_no_weights_file_gets_one_clear_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        open_state_dict(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.9999])
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_file_cut_short_is_noticed(
    tmp_path: Path, tensors: dict[str, Tensor], name: str, keep: float
) -> None:
    path = tmp_path / name
    if name.endswith("ckpt"):
        save(path, lightning(tensors))
    else:
        save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        load_vae(open_state_dict(path))


def test_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such weights file"):
        open_state_dict(tmp_path / "absent.ckpt")
    with pytest.raises(WeightsError, match=r"directory without model\.safetensors"):
        open_state_dict(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"state_dict": [torch.zeros(1)]},
        [torch.zeros(1)],
        {"epoch": 3},
    ],
)
def test_a_torch_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(WeightsError, match="holds no weights"):
        open_state_dict(save(tmp_path / "a.ckpt", content))


def test_another_architecture_is_recognised(tmp_path: Path) -> None:
    other = {"encoder.conv_in.weight": torch.zeros(128, 3, 3, 3), "decoder.x": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"not hold a Reducio-VAE: no encoder_3d.*decoder\.x"):
        load_vae(open_state_dict(save(tmp_path / "sd.ckpt", {"state_dict": other})))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((8,), float("nan")), "not finite"),
        (torch.zeros(8, dtype=torch.int8), "quantised"),
    ],
)
def test_values_that_would_encode_rubbish_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], value: Tensor, message: str
) -> None:
    state = {**tensors, "encoder_3d.conv_in.bias": value}
    with pytest.raises(WeightsError, match=f"conv_in.bias.*{message}"):
        load_vae(open_state_dict(save(tmp_path / "a.ckpt", {"state_dict": state})))


def touch(path: str) -> None:
    Path(path).touch()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (touch, (str(self.target),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_asks_to_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, tensors: dict[str, Tensor], legacy: bool, protocol: int
) -> None:
    trace = tmp_path / "was-run"
    content = {**lightning(tensors), "hyper_parameters": Malicious(trace)}
    path = save(
        tmp_path / "a.ckpt",
        content,
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    with pytest.raises(WeightsError):
        load_vae(open_state_dict(path))
    assert not trace.exists()
    function, arguments = Malicious(trace).__reduce__()
    function(*arguments)  # what it would have done
    assert trace.exists()


def test_the_refusal_names_what_was_asked_for_and_the_remedy(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    content = {**lightning(tensors), "callbacks": Malicious(tmp_path / "x")}
    with pytest.raises(WeightsError, match=r"\.touch\).*nothing in it was run.*state_dict"):
        open_state_dict(save(tmp_path / "a.ckpt", content))


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "was-run"
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    with pytest.raises(WeightsError):
        open_state_dict(tmp_path / "a.ckpt")
    assert not trace.exists()


def test_records_of_a_training_framework_are_left_unread(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of Lightning and OmegaConf need not be installed, and are not imported."""
    sources = {
        "omegaconf/listconfig.py": "class ListConfig: pass",
        "pytorch_lightning/utilities/parsing.py": "class AttributeDict(dict): pass",
    }
    for name, source in sources.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True)
        (tmp_path / "site" / name).write_text(source)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "site")
        config = import_module("omegaconf.listconfig").ListConfig()
        config.content = [1, 2]
        hyper = import_module("pytorch_lightning.utilities.parsing").AttributeDict(c=config)
        content = {**lightning(tensors), "hyper_parameters": hyper, "where": Path("a/b")}
        path = save(tmp_path / "a.ckpt", content)
    foreign = [m for m in sys.modules if m.startswith(("omegaconf", "pytorch_lightning"))]
    for module in foreign:
        monkeypatch.delitem(sys.modules, module)

    assert load_vae(open_state_dict(path)).weights_sha256 == digest(tensors)
    assert not set(foreign) & sys.modules.keys()


def test_averaged_weights_are_never_taken_or_left_silently(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    averaged = {
        f"model_ema.{key.replace('.', '')}": tensor + 1
        for key, tensor in tensors.items()
        if not key.endswith("pos_embed")
    }
    records = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    path = save(tmp_path / "a.ckpt", {"state_dict": {**tensors, **averaged, **records}})
    with pytest.raises(WeightsError, match=r"twice.*--ema or --no-ema"):
        open_state_dict(path)

    plain = load_vae(open_state_dict(path, ema=False)).model.state_dict()
    mean = load_vae(open_state_dict(path, ema=True)).model.state_dict()
    for key, tensor in tensors.items():
        assert torch.equal(plain[key], tensor)
        assert torch.equal(mean[key], tensor + (0 if key.endswith("pos_embed") else 1))

    del averaged["model_ema.decoderconv_inbias"]
    path = save(tmp_path / "b.ckpt", {"state_dict": {**tensors, **averaged}})
    with pytest.raises(WeightsError, match=r"no averaged copy of decoder\.conv_in\.bias"):
        open_state_dict(path, ema=True)


def test_asking_for_averages_that_are_not_there_is_an_error(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    with pytest.raises(WeightsError, match="no averaged weights"):
        open_state_dict(save(tmp_path / "a.ckpt", lightning(tensors)), ema=True)


def test_a_key_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    state = {"a.weight": torch.zeros(1), "module.a.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"has a\.weight twice"):
        open_state_dict(save(tmp_path / "a.ckpt", {"state_dict": state}))
