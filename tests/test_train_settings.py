"""A run's settings: strict YAML, presets, overrides, schedules."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from reducio_latents.cli.train import train as command
from reducio_latents.errors import ConfigError
from reducio_latents.train.config import Schedule, TrainConfig
from reducio_latents.train.settings import (
    changed_settings,
    parse_yaml,
    presets,
    read_settings,
    to_yaml,
)

SCHEMAS = Path(__file__).parents[1] / "schemas"


def test_the_presets_are_the_published_runs() -> None:
    ft4, ft2 = read_settings("reducio_ft4_fs32"), read_settings("configs/reducio_ft2_fs32.yaml")
    assert (ft4.model.temporal_stride, ft2.model.temporal_stride) == (4, 2)
    assert replace(ft2, model=ft4.model) == ft4
    assert ft4.model.width == ft4.model.content_width == ft4.model.decoder_width == 128
    assert (ft4.data.clip.frames, ft4.data.clip.rate_fps, ft4.data.size_px) == (16, 16.0, 256)
    train, loss, adversarial = ft4.train, ft4.loss, ft4.adversarial
    assert (train.batch_size, train.betas, train.lr) == (4, (0.5, 0.9), 2e-5)
    assert (loss.reconstruction, loss.perceptual, loss.perceptual_weight) == ("l1", "vgg", 0.1)
    assert (loss.kl_weight, loss.penalty_weight, loss.logvar) == (1e-6, 1.0, 0.0)
    assert (adversarial.weight, adversarial.start_step) == (0.05, 10_001)
    assert (adversarial.discriminators, adversarial.lr_factor) == (("3d",), 0.1)
    tiling = read_settings("reducio_ft4_fs32_1024").validation.tiling
    assert tiling is not None
    assert (tiling.tile_px, tiling.overlap) == (256, 0.25)


def test_the_presets_fit_the_published_schema() -> None:
    schema = json.loads((SCHEMAS / "train_config.schema.json").read_text())
    for name, text in presets().items():
        jsonschema.validate(parse_yaml(text, where=name), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"lrr": 1}}, schema)


def test_the_rates_of_the_presets_change_as_published() -> None:
    config = read_settings("reducio_ft4_fs32")
    generator, discriminator = config.train.schedule, config.adversarial.schedule
    found = [generator.multiplier(step) for step in (0, 500_000, 1_000_000, 2_000_000)]
    assert found == pytest.approx([1.0, 0.505, 0.01, 0.01])
    found = [discriminator.multiplier(step) for step in (0, 5_000, 5_500, 6_000, 10_000)]
    assert found == pytest.approx([0.1, 0.1, 0.55, 1.0, 1.0])


def test_a_cosine_schedule_warms_up_and_ends_where_it_should() -> None:
    cosine = Schedule(end=0.1, to_step=100, shape="cosine", warmup_steps=10)
    rates = [cosine.multiplier(step) for step in range(120)]
    assert rates[:9] == sorted(rates[:9])
    assert rates[12:101] == sorted(rates[12:101], reverse=True)
    assert rates[50] == pytest.approx(0.55)
    assert rates[100:] == pytest.approx([0.1] * 20)


def test_a_schedule_without_a_way_is_a_sudden_change() -> None:
    jump = Schedule(start=0.5, end=2.0, from_step=3, to_step=3)
    assert [jump.multiplier(step) for step in (0, 2, 3, 4)] == [0.5, 0.5, 2.0, 2.0]


OVERRIDES = (
    "data.corpus=videos",
    "train.lr=1e-5",
    "train.freeze=[decoder]",
    "adversarial.adaptive=false",
)


def test_settings_survive_being_written_and_read(tmp_path: Path) -> None:
    for name in presets():
        config = read_settings(name, OVERRIDES)
        (tmp_path / "settings.yaml").write_text(to_yaml(config))
        assert read_settings(str(tmp_path / "settings.yaml")) == config
        assert config.train.lr == 1e-5
        assert config.train.freeze == ("decoder",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train: unknown key 'lrr'; did you mean 'lr'?"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("train.lr=fast", "lr must be float, got 'fast'"),
        ("train.steps=1.5", "steps must be int, got 1.5"),
        ("train.lr", "write section.key=value"),
        ("data.corpus=*.mp4", """quotes of its own: --set 'data.corpus="*.mp4"'."""),
        ("data.corpus=my videos #1", "what follows # is a comment in YAML. Put the value"),
        ("train.lr.x=1", "lr is a value, not a section"),
        ("train.steps=0", "train.steps must be >= 1, got 0"),
        ("train.seed=-1", "train.seed must be in"),
        ("train.lr=.inf", "train.lr is inf; use a finite number"),
        ("loss.logvar=.nan", "loss.logvar is nan; use a finite number"),
        ("train.ema_decay=1.0", "train.ema_decay must be between 0 and 1"),
        ("train.freeze=[decoder]", "gradients at its last layer"),
        ("train.freeze=[video_encoder, content_encoder, decoder]", "there is nothing to train"),
        ("train.precision=fp8", "precision must be one of fp32, bf16, fp16"),
        ("data.size_px=250", "use a multiple of 32, such as 224"),
        ("data.crop_area=[0.9, 0.5]", "smallest <= largest"),
        ("data.clip.frames=8", "data.clip.frames must be 16"),
        ("data.clip.policy=every", "clip.policy is 'every'"),
        ("adversarial.discriminators=[3d, 3d]", "names one twice"),
        ("adversarial.schedule.to_step=1", "0 <= from_step <= to_step"),
        ("loss.perceptual=alex", "perceptual must be one of vgg, none"),
        ("model.width=100", "use a multiple of 8, such as 96"),
        ("checkpoint.keep_last=0", "keep_last must be >= 1"),
        ("train.betas=[0.9, 1.5]", "train.betas must be in [0, 1), got [0.9, 1.5]"),
        ("loss.kl_weight=-1", "loss.kl_weight must be >= 0"),
        ("adversarial.lr_factor=0", "adversarial.lr_factor > 0, got 0.05 and 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r".*") as caught:
        read_settings("reducio_ft4_fs32", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 1e-5, lr: 2e-5}", "'lr' is given twice"),
        ("- 1", "must hold sections"),
        ("train: [", "is not YAML"),
        ("train:\n  lr: a: b", "is not YAML: line 2: mapping values are not allowed here."),
        ("train: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_is_not_settings_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(str(tmp_path / "x.yaml"))
    assert message in str(caught.value)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean reducio_ft4_fs32"):
        read_settings("reducio_ft4_fs3")
    with pytest.raises(ConfigError, match="no file and no preset"):
        read_settings("elsewhere/reducio_ft4_fs32.yaml")


def test_the_help_names_the_presets() -> None:
    shown = CliRunner().invoke(command, ["--help"]).output.replace(",", " ").split()
    assert set(presets()) <= {word.rstrip(".") for word in shown}


def test_numbers_may_be_written_as_people_write_them() -> None:
    raw = parse_yaml("{a: 1e-5, b: 2E3, c: -1.5e+2, d: 1, e: e5}", where="test")
    assert raw == {"a": 1e-5, "b": 2e3, "c": -150.0, "d": 1, "e": "e5"}


def test_words_are_words_and_only_true_and_false_are_booleans() -> None:
    raw = parse_yaml("{a: off, b: on, c: no, d: true, e: False}", where="test")
    assert raw == {"a": "off", "b": "on", "c": "no", "d": True, "e": False}
    assert read_settings("reducio_ft4_fs32", ["log.wandb=off"]).log.wandb == "off"


def test_a_wandb_key_is_for_wandb_and_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["reducio_tiny_ft4_fs32", "-k", "secret", "--dry-run"]
    refused = CliRunner().invoke(command, words)
    assert refused.exit_code == 2
    assert "Add --set log.wandb=online" in refused.output
    monkeypatch.setattr(sys, "argv", ["train", *words, "-ksecret"])
    assert CliRunner().invoke(command, [*words, "--set", "log.wandb=offline"]).exit_code == 0
    assert "secret" not in " ".join(sys.argv)  # wandb keeps the command line, and shows it


def test_what_a_run_cannot_change_when_it_resumes_is_named(tmp_path: Path) -> None:
    config = TrainConfig()
    assert changed_settings(tmp_path, config) == []
    (tmp_path / "settings.yaml").write_text(to_yaml(config))
    faster = replace(config, train=replace(config.train, lr=1e-3, steps=5))
    assert changed_settings(tmp_path, faster) == []
    other = replace(config, train=replace(config.train, seed=1))
    assert changed_settings(tmp_path, other) == ["train.seed is 1, was 0"]
