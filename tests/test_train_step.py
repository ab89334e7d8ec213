"""One training step: what it computes, what it changes, what it refuses to keep."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from reducio_latents.errors import TrainingError
from reducio_latents.train.config import AdversarialConfig, OptimisationConfig, TrainConfig
from reducio_latents.train.state import (
    PRECISIONS,
    TrainState,
    build_state,
    prepare_networks,
    update_average,
)
from reducio_latents.train.step import Stepper, generator_terms, train_step
from tests.test_train_losses import rule_discriminator, rule_vae, rule_video
from tests.train_ranks import (
    ALONE,
    QUICK,
    TINY,
    Apart,
    Difference,
    Trial,
    compare,
    made_up_batch,
    run_steps,
    tiny_config,
    weights,
)

QUIET = AdversarialConfig(discriminators=())
HEARD = AdversarialConfig(start_step=0)


def prepared(config: TrainConfig) -> tuple[TrainState, Stepper]:
    state = build_state(config, ALONE.device)
    return state, Stepper(config, prepare_networks(state, config.train, ALONE), None, ALONE)


def quick(**settings: Any) -> OptimisationConfig:
    """Settings for tests that do not compare numbers closely."""
    return OptimisationConfig(**{"precision": QUICK, "lr": 1e-4, "eps": 1e-3, **settings})


def assert_close(found: dict[str, float], wanted: dict[str, float]) -> None:
    """Compare terms; gradients through norms of the four values that a group has here are rough."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        rough = name in ("grad_norm", "adversarial_weight")
        assert found[name] == pytest.approx(value, rel=2e-2 if rough else 1e-3), name


def test_the_step_adds_the_terms_up_as_published() -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "train_losses.json").read_text())
    state, run = prepared(tiny_config())
    state.vae, video = rule_vae(8).requires_grad_(True), rule_video(21, 32)
    state.discriminators["3d"] = rule_discriminator()
    recon, posterior = state.vae(video)
    terms = generator_terms(state, video, recon, posterior, run, adversarial=True)
    total, weight = (float(terms[name].detach()) for name in ("total", "adversarial_weight"))
    assert total == pytest.approx(golden["total_loss_ae"], rel=1e-4)
    assert weight == pytest.approx(golden["d_weight"], rel=5e-3)
    quiet = generator_terms(state, video, recon, posterior, run, adversarial=False)
    expected = golden["nll_loss"] + 1e-6 * golden["kl_loss"] + golden["penalty_loss"]
    assert float(quiet["total"].detach()) == pytest.approx(expected, rel=1e-5)


def test_the_perceptual_term_is_part_of_the_nll() -> None:
    state, run = prepared(tiny_config(quick(precision="fp32"), QUIET))
    run = replace(run, lpips=Difference())  # type: ignore[arg-type]
    video = rule_video(21, 32)
    recon, posterior = state.vae(video)
    terms = generator_terms(state, video, recon, posterior, run, adversarial=False)
    assert terms["lpips"] > 0
    torch.testing.assert_close(terms["nll"], terms["l1"] + 0.1 * terms["lpips"])


def test_the_discriminator_rests_until_its_first_step() -> None:
    state, run = prepared(tiny_config(quick(), AdversarialConfig(start_step=1)))
    before = {k: t.clone() for k, t in state.discriminators.state_dict().items()}
    first = train_step(state, [made_up_batch([0])], run)
    assert "disc" not in first
    assert all(torch.equal(t, before[k]) for k, t in state.discriminators.state_dict().items())
    second = train_step(state, [made_up_batch([2])], run)
    assert second["disc"] > 0
    moved = [not torch.equal(t, before[k]) for k, t in state.discriminators.named_parameters()]
    assert all(moved)


def test_the_generator_leaves_no_gradient_in_the_discriminator() -> None:
    state, run = prepared(tiny_config(quick(), HEARD))
    seen = {}

    def look(*_: object) -> None:
        seen["before its own pass"] = [p.grad for p in state.discriminators.parameters()]

    state.discriminators.register_forward_pre_hook(look)
    train_step(state, [made_up_batch([0])], run)
    assert all(grad is None for grad in seen["before its own pass"])


def test_training_lowers_the_loss() -> None:
    state, run = prepared(tiny_config(quick(lr=1e-3, max_grad_norm=1.0), QUIET))
    grey = made_up_batch([0])
    grey.frames_BTHWC.fill_(60)
    values = [train_step(state, [grey], run)["total"] for _ in range(8)]
    assert values[-1] < 0.7 * values[0]


def test_accumulated_batches_count_as_one_large_one() -> None:
    outcomes = []
    for accumulate in (1, 2):
        config = tiny_config(quick(accumulate=accumulate, precision="fp32"), QUIET)
        outcomes.append(run_steps(build_state(config, ALONE.device), config, ALONE, steps=1))
    for whole, parts in zip(*outcomes, strict=True):
        assert_close(parts, whole)


def test_two_ranks_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    together, _ = compare(Trial(steps=2, clips=2, accumulate=1, thin=True), tmp_path)
    assert_apart(together, values=3e-5, weights=3e-3)


def test_accumulating_ranks_do_a_step_as_one_does_with_the_published_loss(tmp_path: Path) -> None:
    together, _ = compare(Trial(steps=1, kinks=True, thin=True), tmp_path)
    assert_apart(together, values=1e-2, weights=5e-2)


def assert_apart(apart: Apart, values: float, weights: float) -> None:
    """Check that nothing is further apart; Adam makes of rounding in small gradients more."""
    assert apart.keys() >= {"disc", "adversarial_weight", "average", "batch statistics"}
    for name, course in apart.items():
        bound = weights if name in ("VAE", "average", "discriminators") else values
        assert max(course) < bound, name


def test_checkpointed_activations_give_the_same_bits() -> None:
    outcomes = []
    for checkpointing in (False, True):
        config = tiny_config(quick(checkpointing=checkpointing))
        state, run = prepared(config)
        train_step(state, [made_up_batch([0])], run)
        outcomes.append(weights(state))
    assert all(torch.equal(outcomes[0][key], tensor) for key, tensor in outcomes[1].items())


@cache
def after_a_step(
    precision: Literal["fp32", "bf16", "fp16"],
) -> tuple[TrainState, dict[str, float]]:
    """Return what a step has come to, but for the size of gradients: in so small a model they go
    through norms of four values."""
    config = tiny_config(OptimisationConfig(precision=precision, lr=1e-4), HEARD)
    state, run = prepared(config)
    values = train_step(state, [made_up_batch([0])], run)
    return state, {name: value for name, value in values.items() if name != "grad_norm"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_single(
    precision: Literal["bf16", "fp16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What matters of fp16 here is the scaler; CPUs take minutes for its convolutions.
    monkeypatch.setitem(PRECISIONS, "fp16", torch.bfloat16)
    state, found = after_a_step(precision)
    assert state.scaler.is_enabled() == (precision == "fp16")
    assert found == pytest.approx(after_a_step("fp32")[1], rel=0.05, abs=0.1)
    assert all(p.dtype == torch.float32 for p in state.vae.parameters())


def test_an_overflow_of_scaled_gradients_skips_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRECISIONS, "fp16", torch.bfloat16)
    state, run = prepared(tiny_config(OptimisationConfig(precision="fp16", lr=1e-4), HEARD))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    before = {key: tensor.clone() for key, tensor in state.vae.state_dict().items()}
    values = train_step(state, [made_up_batch([0])], run)
    assert math.isfinite(values["nll"])
    assert not math.isfinite(values["grad_norm"])
    assert state.scaler.get_scale() < 3e38
    assert all(torch.equal(t, before[key]) for key, t in state.vae.state_dict().items())


def test_channels_last_changes_the_layout_and_not_the_loss() -> None:
    totals = []
    for channels_last in (False, True):
        state, run = prepared(tiny_config(quick(channels_last=channels_last), QUIET))
        totals.append([train_step(state, [made_up_batch([0])], run)["total"] for _ in range(2)])
    weight = state.vae.decoder.conv_in.get_parameter("weight")
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert totals[1] == pytest.approx(totals[0], rel=1e-2)


def test_the_average_follows_the_weights_slowly() -> None:
    config = tiny_config(quick(ema_decay=0.9), QUIET)
    state, run = prepared(config)
    start = state.vae.decoder.conv_in.get_parameter("weight").detach().clone()
    state.step = 1000
    train_step(state, [made_up_batch([0])], run)
    now = state.vae.decoder.conv_in.get_parameter("weight").detach()
    average = state.measured.decoder.conv_in.get_parameter("weight")
    assert state.measured is state.average
    assert not torch.equal(now, start)
    torch.testing.assert_close(average, 0.9 * start + 0.1 * now)
    assert not torch.equal(average, now)


def test_the_average_takes_the_buffers_of_the_weights() -> None:
    # Weights that are started from may have others than a new model: their scale of differences.
    model = replace(TINY, target="difference")
    config = replace(tiny_config(quick(ema_decay=0.9), QUIET), model=model)
    state, _ = prepared(config)
    state.vae.difference_scale.fill_(16)
    assert state.average is not None
    update_average(state.average, state.vae, decay=0.9)
    assert float(state.average.difference_scale) == 16


def test_what_is_frozen_stays_and_the_rest_moves() -> None:
    config = tiny_config(quick(freeze=("content_encoder", "video_encoder")))
    state, run = prepared(config)
    before = {k: t.clone() for k, t in state.vae.state_dict().items()}
    train_step(state, [made_up_batch([0])], run)
    moved = {k for k, t in state.vae.state_dict().items() if not torch.equal(t, before[k])}
    assert moved
    assert {key.partition(".")[0] for key in moved} == {"decoder", "post_quant_conv"}


def test_the_rates_of_a_step_are_those_of_the_schedules() -> None:
    state, run = prepared(tiny_config(quick(), QUIET))
    state.step = 3
    train_step(state, [made_up_batch([0])], run)
    schedule = run.config.train.schedule
    assert state.vae_optimizer.param_groups[0]["lr"] == 1e-4 * schedule.multiplier(3)


def test_a_loss_that_is_not_a_number_stops_and_changes_nothing() -> None:
    state, run = prepared(tiny_config(quick(ema_decay=0.9)))
    train_step(state, [made_up_batch([0])], run)
    with torch.no_grad():
        state.vae.decoder.conv_out.get_parameter("bias")[0] = float("nan")
    before = {k: t.clone() for k, t in weights(state).items()}
    with pytest.raises(TrainingError) as caught:
        train_step(state, [made_up_batch([4, 5])], run)
    message = str(caught.value)
    assert "step 2: total, nll, l1" in message.replace("l1, nll", "nll, l1")
    assert "4.mp4 at 0.000 s; 5.mp4 at 0.000 s" in message
    assert state.step == 1
    for key, tensor in weights(state).items():
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)
