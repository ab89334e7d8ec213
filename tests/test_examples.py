"""The files in `examples/` run as they stand, one after another, as their first lines say."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch
import webdataset

from reducio_latents import LatentDataset, open_store
from reducio_latents.files import LocalFiles
from reducio_latents.upkeep.convert import convert_store
from tests.corpora import write_corpus
from tests.forked import Python

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(name: str, *arguments: object) -> str:
    """Run an example and return what it printed."""
    process = Python([EXAMPLES / name, *arguments], ENVIRONMENT)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    path = folder / "store.latents"
    printed = run("encode_and_look.py", write_corpus(folder / "videos"), path, 64)
    assert "6 found = 3 encoded + 2 skipped + 1 failed" in printed
    assert "motion         torch.float16 (32, 4, 2, 2)" in printed
    return path


def test_a_diffusion_transformer_trains_and_goes_on_where_it_stopped(
    store: Path, tmp_path: Path
) -> None:
    undisturbed = run("train_a_dit.py", store, tmp_path / "whole.pt", 4, 2).splitlines()
    first = run("train_a_dit.py", store, tmp_path / "parts.pt", 2, 2).splitlines()
    rest = run("train_a_dit.py", store, tmp_path / "parts.pt", 4, 2).splitlines()
    assert first + rest == undisturbed
    assert not list(tmp_path.glob("*.mp4"))
    run("train_a_dit.py", store, tmp_path / "parts.pt", 5, 2, 5)
    assert (tmp_path / "step-5.mp4").stat().st_size > 1000
    saved = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert saved["step"] == 5


def test_latents_are_decoded_to_videos(store: Path, tmp_path: Path) -> None:
    printed = run("decode_samples.py", store, tmp_path / "samples", "--count", 2).splitlines()
    assert len(printed) == 2
    assert all(Path(path).stat().st_size > 1000 for path in printed)


def test_the_stock_webdataset_gives_what_a_dataset_does(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    convert_store(opened, LocalFiles(tmp_path), "webdataset")
    [bucket] = (bucket for bucket in opened.meta.buckets if (tmp_path / bucket).exists())
    printed = run("train_by_webdataset.py", tmp_path / bucket, 3, 2).splitlines()
    assert len(printed) == 3
    assert "latents (2, 16, 4, 2, 2)" in printed[0]

    final_latents = runpy.run_path(str(EXAMPLES / "train_by_webdataset.py"))["final_latents"]
    tars = sorted(map(str, (tmp_path / bucket).glob("shard-??????.tar")))
    samples = webdataset.WebDataset(tars, shardshuffle=False)
    theirs = {s["json"]["clip_id"]: final_latents(s, noise=0) for s in samples.decode()}
    ours = LatentDataset(store, ("motion", "clip_id"), batch_size=1, latents="mean")
    for batch in ours:
        torch.testing.assert_close(theirs.pop(batch["clip_id"][0]), batch["latents"][0])
    assert not theirs


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
