"""What measures speed runs, on little, and says what it should."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner

from reducio_latents.cli import main
from reducio_latents.core.geometry import Bucket
from reducio_latents.encode import bench
from reducio_latents.encode.bench import EncoderBench, Variant, launched
from reducio_latents.encode.fast_path import made_up_clips
from reducio_latents.encode.gpu import BatchEncoder
from reducio_latents.train.config import AdversarialConfig
from tests.corpora import write_video
from tests.train_ranks import QUICK

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model", "reducio-random:8", "--device", "cpu", "--no-compile", "--seconds", "0.01"]
NOT_NEEDED = {"av", "click", "google_crc32c", "PIL", "pyarrow", "safetensors", "zarr"}
LOADED = """
import pathlib, runpy, sys
sys.path[0] = str(pathlib.Path(sys.argv[1]).parent)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
print("loaded:", *{name.partition(".")[0] for name in sys.modules})
"""


def test_bench_prints_every_variant_against_the_naive_loop_and_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BATCHES", 1)
    write_video(tmp_path / "v.mp4", 1.1, seed=1)
    size = ["--resolution", "32", "--batches", "1", "--psnr-loss", "--corpus", str(tmp_path)]
    result = CliRunner().invoke(main, ["bench", *TINY, *size])
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1:-1] for line in result.output.splitlines() if line.startswith("| ")]
    names = [row[0].strip() for row in rows[1:]]
    assert names[0].startswith("naive")
    assert names[1:] == [
        "float32",
        "float32 channels_last_3d",
        "bfloat16",
        "bfloat16 channels_last_3d",
    ]
    for row in rows[2:]:
        assert 0 < float(row[6]) < 0.1
        assert abs(float(row[7])) < 0.1
    assert re.search(r"1 clips: naive loop [\d.]+ s, a run [\d.]+ s", result.output)


@pytest.mark.parametrize(
    ("sizes", "code", "says"),
    [("8,many", 2, "'many' is not a whole number"), ("8,0", 1, "numbers from 1, got [8, 0]")],
)
def test_batch_sizes_are_numbers_from_1(sizes: str, code: int, says: str) -> None:
    result = CliRunner().invoke(main, ["bench", "--batches", sizes])
    assert result.exit_code == code
    assert says in result.output


def test_gpu_report_needs_torch_numpy_and_einops_alone_and_says_what_it_had_no_time_for() -> None:
    report = str(ROOT / "tools" / "gpu_report.py")
    run = subprocess.run(
        [sys.executable, "-c", LOADED, report, *TINY, "--side", "32", "--minutes", "0"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "| naive: batch 1" in run.stdout
    assert "skipped for want of time: bfloat16 channels_last_3d, batch 8" in run.stdout
    assert not NOT_NEEDED & set(run.stdout.splitlines()[-1].split())


def test_what_only_a_gpu_shows_is_imported_where_libraries_are_missing() -> None:
    """The libraries of the rooms that are named here are those of the test above."""
    begins = [
        node.module
        for node in ast.parse((ROOT / "tests" / "test_cuda.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    assert not [name for name in begins if name.startswith("tests")]
    rooms = {name.split(".")[1] for name in begins if name.startswith("reducio_latents.")}
    assert rooms <= {"autoencoders", "core", "encode", "vae", "video"}


def test_a_part_alone_has_all_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = runpy.run_path(str(ROOT / "tools" / "gpu_report.py"))
    left: list[float] = []
    monkeypatch.setitem(
        tool["PARTS"], "train", lambda report: left.append(report.deadline - time.monotonic())
    )
    report = ["gpu_report", "--device", "cpu", "--seconds", "0.01", "--minutes", "5"]
    monkeypatch.setattr(sys, "argv", [*report, "--only", "train"])
    tool["main"]()
    assert left[0] > 270


def test_gpu_report_measures_each_of_its_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(work: Callable[[], object], device: torch.device, _: float) -> Any:
        return 0.0, [bench._time(work, device)]

    monkeypatch.setattr(bench, "timed", once)
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = runpy.run_path(str(ROOT / "tools" / "gpu_report.py"))
    report = tool["Report"](
        device=torch.device("cpu"),
        model="reducio-random:8",
        side=32,
        batches=[1],
        seconds=0.0,
        compiles=False,
        decodes=False,
    )
    for part in ("profile", "busy", "decode"):
        tool["PARTS"][part](report)
    said = capsys.readouterr().out
    assert "skipped" not in said
    assert "| aten::" in said  # a CPU's kernels
    assert "clips/s, GPU busy not measured on a CPU" in said
    assert len(re.findall(r"\| (?:de|en)code.*\| [\d.]+ \| \d+% \|", said)) == 3
    assert tool["digest"](report, 0) == tool["digest"](report, 1)


def test_bench_train_prints_what_is_recomputed(capsys: pytest.CaptureFixture[str]) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "bench_train.py"))
    alone = AdversarialConfig(discriminators=())  # which would take most of the time
    base = replace(tool["base_config"](width=8, size_px=32), adversarial=alone)
    names, batch = [f"{QUICK} channels_last checkpointing"], tool["made_up_batch"](1, 32)
    tool["print_table"](names, base, batch, 1, torch.device("cpu"))
    said = capsys.readouterr().out
    (row,) = (line.split("|")[1:-1] for line in said.splitlines() if line.startswith(f"| {QUICK}"))
    assert row[2].split()[0] == "1.00"
    assert re.fullmatch(r"[1-9]\d*%", row[-1].strip())


def test_what_would_begin_after_the_deadline_is_left_out() -> None:
    bench = EncoderBench(
        model="reducio-random:8",
        device=torch.device("cpu"),
        bucket=Bucket(16, 32, 32),
        variants=[Variant("late", torch.float32)],
        seconds=0.0,
        deadline=0.0,
    )
    assert [found.variant.name for found in bench.run()] == ["naive: batch 1, float32, no overlap"]


def test_a_batch_is_launched_before_the_one_ahead_is_waited_for() -> None:
    told: list[str] = []

    class Encoder:
        def launch(self, frames: int) -> object:
            told.append(f"launch {frames}")
            return lambda: told.append(f"wait {frames}")

    for wait in launched(cast(BatchEncoder, Encoder()), cast(list[torch.Tensor], [1, 2, 3])):
        wait()
    assert told == ["launch 1", "launch 2", "wait 1", "launch 3", "wait 2", "wait 3"]


def test_how_busy_a_cpu_was_is_unknown() -> None:
    bench = EncoderBench(
        model="reducio-random:8", device=torch.device("cpu"), bucket=Bucket(16, 32, 32)
    )
    encoder = BatchEncoder(bench.load(Variant("plain", torch.float32)))
    encoder.launch(made_up_clips(1, bench.bucket))()
    assert encoder.take_busy_s() is None
