"""What a run writes while it trains."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from reducio_latents.errors import ConfigError
from reducio_latents.train.config import LogConfig, TrainConfig
from reducio_latents.train.records import TRAIN_COLUMNS, CsvTable, Records, pairs_sheet
from reducio_latents.train.validate import Pair, compare, score_clips, tiling_for
from reducio_latents.vae import Tiling


def pairs(count: int, side: int = 32) -> list[Pair]:
    shape = (16, side, side, 3)
    return [
        Pair(
            torch.full(shape, 10 * n, dtype=torch.uint8), torch.full(shape, 200, dtype=torch.uint8)
        )
        for n in range(count)
    ]


def test_a_table_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "x.csv", ("step", "loss"), step=0)
    for step in (1, 2, 3):
        table.add({"step": step, "loss": 0.5 * step})
    with (tmp_path / "x.csv").open("a") as file:
        file.write("4")  # killed while writing
    CsvTable(tmp_path / "x.csv", ("step", "loss"), step=2).add({"step": 3, "loss": 9.0})
    assert (tmp_path / "x.csv").read_text() == "step,loss\n1,0.5\n2,1.0\n3,9.0\n"


def test_originals_stand_above_their_reconstructions() -> None:
    video = compare(pairs(3))
    assert video.shape == (16, 64, 96, 3)
    assert video[0, 5, ::32, 0].tolist() == [0, 10, 20]
    assert bool((video[:, 32:] == 200).all())
    sheet = pairs_sheet(pairs(2))
    assert sheet.shape == (4 * 32, 8 * 32, 3)
    assert sheet[::32, 0, 0].tolist() == [0, 200, 10, 200]


def test_clips_of_other_sizes_are_left_out_of_a_picture(tmp_path: Path) -> None:
    config = TrainConfig(log=LogConfig(tensorboard=False))
    records = Records(tmp_path, config, step=0)
    records.pictures("training", 1, [*pairs(1), *pairs(1, side=64)])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "training-00000001.png",
        "training-00000001.mp4",
    }


def test_tensorboard_has_every_number_and_the_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = Records(tmp_path, TrainConfig(), step=0)
    records.train(5, {"total": 0.25})
    records.validation(5, {"psnr_db": 30.0, "clips": 2.0})
    records.pictures("validation", 5, pairs(1))
    records.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Scalars("train/total")[0].value == 0.25
    assert board.Scalars("validation/psnr_db")[0].step == 5
    assert board.Images("validation/pictures")[0].width == 8 * 32


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append({**values, "step": step})

    def finish(self) -> None:
        self.finished = True


def test_wandb_is_told_the_same_and_a_second_start_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    run = FakeRun()
    fake = ModuleType("wandb")
    fake.Settings = dict  # type: ignore[attr-defined]
    fake.init = lambda **words: calls.append(words) or run  # type: ignore[attr-defined,func-returns-value]
    fake.Video = lambda path, **_: path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = TrainConfig(log=LogConfig(tensorboard=False, wandb="offline"))
    records = Records(tmp_path, config, step=0, wandb_key="secret")
    records.train(1, {"total": 0.5})
    records.pictures("training", 1, pairs(1))
    records.close()
    Records(tmp_path, config, step=1)
    first, second = calls
    assert (first["settings"], second["settings"]) == ({"api_key": "secret"}, None)
    assert first["mode"] == "offline"
    assert first["id"] == second["id"]
    assert run.logged[0] == {"train/total": 0.5, "step": 1}
    assert run.logged[1]["training/video"].endswith("training-00000001.mp4")
    assert run.finished


def test_wandb_that_does_not_start_says_how_to_do_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoServerError(Exception):
        pass

    def init(**_: Any) -> None:
        raise NoServerError("no answer\nfrom the server.")

    fake = ModuleType("wandb")
    fake.Error, fake.init = NoServerError, init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = TrainConfig(log=LogConfig(tensorboard=False, wandb="online"))
    with pytest.raises(ConfigError, match=r"no answer from the server\. --set log\.wandb=offline"):
        Records(tmp_path, config, step=0)


def test_a_missing_logger_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    online = TrainConfig(log=LogConfig(tensorboard=False, wandb="online"))
    with pytest.raises(ConfigError, match=r"pip install wandb, or --set log\.wandb=off"):
        Records(tmp_path, online, step=0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"--set log\.tensorboard=false"):
        Records(tmp_path, replace(online, log=LogConfig()), step=0)


def test_every_term_that_a_step_may_have_is_a_column() -> None:
    assert {"l1", "l2", "lpips", "adversarial", "disc", "waiting_share"} <= set(TRAIN_COLUMNS)


def test_repeating_the_content_image_is_measured_beside_the_model() -> None:
    still = torch.rand(1, 3, 1, 32, 32).mul(2).sub(1).expand(1, 3, 16, 32, 32)
    moving = still.clone()
    moving[:, :, 8:] = -still[:, :, 8:]
    scores = score_clips(moving, still, None)
    assert torch.equal(scores["clip_psnr_db"], scores["content_psnr_db"])
    exact = score_clips(moving, moving, None)
    assert float(exact["clip_psnr_db"]) == pytest.approx(100.0)
    assert float(exact["content_psnr_db"]) < 20
    assert float(exact["ssim"]) == pytest.approx(1.0)


def test_frames_of_one_tile_are_seen_whole() -> None:
    tiling = Tiling(tile_px=256, overlap=0.25)
    assert tiling_for(tiling, 320) is None
    assert tiling_for(tiling, 352) is tiling
    assert tiling_for(None, 1024) is None
