"""Starting from other weights: what fits is taken, and the rest is listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reducio_latents.autoencoders.checkpoint import write_weights
from reducio_latents.errors import WeightsError
from reducio_latents.train.checkpoint import load_checkpoint, save_checkpoint, take_pretrained
from reducio_latents.train.config import OptimisationConfig, TrainConfig
from reducio_latents.train.state import TrainState, build_state
from reducio_latents.vae import ReducioVAE, ReducioVAEConfig
from tests.train_ranks import TINY, tiny_config

CPU = torch.device("cpu")


def fresh(seed: int, config: ReducioVAEConfig = TINY) -> TrainState:
    train = OptimisationConfig(seed=seed, ema_decay=0.9, precision="fp32")
    return build_state(TrainConfig(model=config, train=train), CPU)


def lightning(state: TrainState) -> dict[str, Tensor]:
    """Return a state dict as published checkpoints have it."""
    discriminator = state.discriminators["3d"].state_dict()
    return {
        **state.vae.state_dict(),
        "loss.logvar": torch.zeros(()),
        **{f"loss.discriminator.{key}": tensor for key, tensor in discriminator.items()},
    }


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (key, tensor), value in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, value), key


def test_a_published_checkpoint_is_taken_whole_with_its_discriminator(tmp_path: Path) -> None:
    source, state = fresh(1), fresh(2)
    path = tmp_path / "published.ckpt"
    torch.save({"state_dict": {f"module.{k}": t for k, t in lightning(source).items()}}, path)
    taken = take_pretrained(state, path)
    assert (taken.missing, taken.unused) == ((), ())
    assert taken.lines() == [f"pretrained: {taken.taken} tensors of {path}"]
    assert state.average is not None
    assert_equal(state.vae, source.vae)
    assert_equal(state.average, source.vae)
    assert_equal(state.discriminators, source.discriminators)


def test_a_model_with_another_encoder_takes_the_rest_and_lists_what_it_did_not(
    tmp_path: Path,
) -> None:
    wider = ReducioVAEConfig(width=16, content_width=8, decoder_width=8)
    source, state = fresh(1, wider), fresh(2)
    before = state.vae.encoder_3d.conv_in.get_parameter("weight").detach().clone()
    write_weights(source.vae.state_dict(), wider, tmp_path / "weights")
    taken = take_pretrained(state, tmp_path / "weights")
    assert_equal(state.vae.decoder, source.vae.decoder)
    assert torch.equal(state.vae.encoder_3d.conv_in.get_parameter("weight"), before)
    assert "encoder_3d.conv_in.weight (is (16, 3, 3, 3, 3), the model's (8, 3, 3, 3, 3))" in (
        taken.unused
    )
    assert all(key.startswith("discriminators.3d.") for key in taken.missing)
    assert len(taken.lines()) == 1 + len(taken.missing) + len(taken.unused)
    both = len(state.vae.state_dict()) - len(taken.unused)
    assert taken.taken == both


def test_a_checkpoint_of_this_trainer_brings_its_discriminators(tmp_path: Path) -> None:
    source, state = fresh(1), fresh(2)
    folder = save_checkpoint(tmp_path, source, tiny_config())
    taken = take_pretrained(state, folder)
    assert (taken.missing, taken.unused, state.step) == ((), (), 0)
    assert_equal(state.vae, source.vae)
    assert_equal(state.discriminators, source.discriminators)
    assert take_pretrained(fresh(3), folder / "ema").missing  # weights alone


def test_a_file_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    other = ReducioVAEConfig(width=16, content_width=16, decoder_width=16)
    write_weights(ReducioVAE(other).state_dict(), other, tmp_path / "weights")
    with pytest.raises(WeightsError, match="no weight of its networks fits this model"):
        take_pretrained(fresh(0), tmp_path / "weights")
    (tmp_path / "page.ckpt").write_text("<html>")
    with pytest.raises(WeightsError, match="a web page"):
        take_pretrained(fresh(0), tmp_path / "page.ckpt")


def test_a_checkpoint_of_another_size_is_refused_by_its_sizes(tmp_path: Path) -> None:
    wider = ReducioVAEConfig(width=16, content_width=8, decoder_width=8)
    folder = save_checkpoint(tmp_path, fresh(1, wider), tiny_config())
    with pytest.raises(WeightsError, match=r"width is 16, not 8.*Remove the folder"):
        load_checkpoint(folder, fresh(1))


def test_weights_may_be_read_by_whoever_may_read_their_description(tmp_path: Path) -> None:
    write_weights(ReducioVAE(TINY).state_dict(), TINY, tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
