#!/usr/bin/env python
"""Train the small model that the package ships, measure it, and pack it up.

    python tools/train_tiny.py VIDEOS --out DIR [--start linear] [--set train.steps=20000 ...]

VIDEOS is any corpus. Whole videos are set apart for validation, by a hash of their names;
`--set data.validation_corpus=OTHER` takes those of another corpus, as one should where the same
footage comes under several names. With `--start linear` the run begins with what a linear code can
do (`tools/linear_start.py`, a quarter of an hour on two cores, kept in DIR/start), else with random
weights. The run is in DIR/run and continues when the command is given again. It wants a GPU; what
to set without one is said in the preset, `reducio_tiny_ft4_fs32`.

DIR/reducio-tiny-ft4-fs32 then holds `model.safetensors` (the average of the weights, float16),
`config.json` with its fingerprint, and `README.md`, a card that says on what and how it was trained
and how good it is. The scores on it are of the float16 weights as they were written, on clips of
several sizes, whatever size was trained on. Copied to reducio_latents/autoencoders/bundled/, that
folder is the model `reducio-tiny-ft4-fs32`, and what the quickstart uses.

The exit code is 1 if the model is not at least 3 dB better than repeating the content image on the
validation videos, or is not below 8 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # this checkout, installed or not

from linear_start import Descent, linear_start  # noqa: E402

from reducio_latents.autoencoders.checkpoint import write_weights  # noqa: E402
from reducio_latents.autoencoders.reducio import BUNDLED  # noqa: E402
from reducio_latents.files import open_files  # noqa: E402
from reducio_latents.store.plan import read_plan  # noqa: E402
from reducio_latents.train.batch import TrainOrder  # noqa: E402
from reducio_latents.train.checkpoint import checkpoints  # noqa: E402
from reducio_latents.train.config import TrainConfig  # noqa: E402
from reducio_latents.train.loop import CHECKPOINTS, train  # noqa: E402
from reducio_latents.train.options import RunOptions  # noqa: E402
from reducio_latents.train.settings import read_settings, to_yaml  # noqa: E402
from reducio_latents.train.split import make_split  # noqa: E402
from reducio_latents.train.stream import BatchStream, training_requests  # noqa: E402
from reducio_latents.vae import ReducioVAE  # noqa: E402
from reducio_latents.vae.weights import open_state_dict  # noqa: E402
from reducio_latents.version import __version__  # noqa: E402

Scores = dict[str, float]
"""Of a validation; see `validate.Validation`."""

NAME = "reducio-tiny-ft4-fs32"
MIN_GAIN_DB = 3.0
MAX_BYTES = 8_000_000
EVALUATED_PX, EVALUATED_CLIPS = (256, 128, 64), 24
"""The first size is the one that counts."""
START_CLIPS, FITTED_CLIPS = 240, 64
START_PX, START_AREA = 128, (0.2, 0.5)
"""Smaller parts of frames than are trained on later, at about the same scale: a linear code is the
same at any size, and this costs less."""
LINEAR = Descent(steps=1500, lr=1e-3)
WHOLE = Descent(steps=100, lr=2e-4, warmup=50)


def start_weights(config: TrainConfig, out: Path, shorten: int) -> Path:
    """Make weights to start from, once, and return their folder; see `linear_start`.

    shorten: divide every number of clips and steps by so much, to see that it works.
    """
    folder = out / "start"
    if (folder / "config.json").exists():
        return folder
    data = replace(config.data, size_px=START_PX, crop_area=START_AREA)
    table = make_split(out / "start.plan", data).train
    assert table is not None
    clips = max(1, START_CLIPS // shorten)
    size = config.train.batch_size
    order = TrainOrder(table.bucket_numbers, size, config.train.seed)
    requests = training_requests(order, range(-(-clips // size)), config.train.seed)
    frames = torch.cat([batch.frames_BTHWC for batch in BatchStream(table, data, requests)])
    print(f"start: {len(frames)} clips")
    torch.manual_seed(config.train.seed)
    vae = ReducioVAE(config.model)
    linear_start(
        vae,
        frames,
        fitted=max(1, FITTED_CLIPS // shorten),
        linear=replace(LINEAR, steps=max(1, LINEAR.steps // shorten)),
        whole=replace(WHOLE, steps=max(1, WHOLE.steps // shorten)),
    )
    write_weights(vae.state_dict(), config.model, folder)
    return folder


def export(checkpoint: Path, config: TrainConfig, folder: Path) -> int:
    """Write a checkpoint's averaged weights as float16; return their size in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    averaged = checkpoint / "ema"
    state = open_state_dict(averaged if averaged.exists() else checkpoint / "model")
    half = {key: state.read(key).to(torch.float16) for key in state.shapes}
    write_weights(half, config.model, folder)
    return (folder / "model.safetensors").stat().st_size


def scores_table(scores: dict[int, Scores]) -> str:
    """Return the scores as a Markdown table, one column for each size of clips."""
    rows = {
        "PSNR, mean over frames, dB": [f"{s['psnr_db']:.2f}" for s in scores.values()],
        "SSIM": [f"{s['ssim']:.3f}" for s in scores.values()],
        "PSNR of whole clips, dB": [f"{s['clip_psnr_db']:.2f}" for s in scores.values()],
        "the same, repeating the content image": [
            f"{s['content_psnr_db']:.2f}" for s in scores.values()
        ],
        "gain, dB": [f"{gain_db(s):.2f}" for s in scores.values()],
    }
    head = [
        f"| clips of | {' | '.join(f'{px} px' for px in scores)} |",
        "|---|" + "--:|" * len(scores),
    ]
    return "\n".join([*head, *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items())])


def gain_db(scores: Scores) -> float:
    """Return what the latents are worth, in dB."""
    return scores["clip_psnr_db"] - scores["content_psnr_db"]


def card(config: TrainConfig, out: Path, scores: dict[int, Scores], size: int) -> str:
    """Return the model's card; `scores` by the side of the clips."""
    plan = read_plan(open_files(out / "run"))
    assert plan is not None
    description = json.loads((out / NAME / "config.json").read_text())
    # Where the videos lay is nobody's business.
    corpus, other = (
        None if path is None else Path(path).name
        for path in (config.data.corpus, config.data.validation_corpus)
    )
    shown = replace(config, data=replace(config.data, corpus=corpus, validation_corpus=other))
    step = checkpoints(out / "run" / CHECKPOINTS)[-1].name.removeprefix("step-")
    validation = json.loads((out / f"evaluation-{EVALUATED_PX[0]}" / "evaluation.json").read_text())
    videos = f"{plan.counts().videos['planned']} videos"
    if config.data.validation_corpus is None:
        videos += " less those of the validation"
    first = "random"
    if (out / "start" / "config.json").exists():
        first = (
            f"a linear start from {START_CLIPS} clips\n  (`tools/linear_start.py`): {LINEAR.steps} "
            f"steps of the linear code and {WHOLE.steps} of the whole\n  network between the maps "
            "of stride 8"
        )
    return f"""# {NAME}

A Reducio-VAE of {size / 1e6:.1f} MB, for trying `reducio-latents` out: its pictures are those of a
trained model, its quality is not that of the published ones. Not for production, and not for
judging the architecture.

- Sizes: {config.model}
- Fingerprint: `{description["fingerprint"]}`
- Trained by `tools/train_tiny.py` of reducio-latents {__version__} on {videos}.
- First weights: {first}.
- Then {int(step)} steps of the trainer, with the settings below; weights are a running average
  ({config.train.ema_decay}), in float16.
- Validation: {validation["clips"]} clips of whole videos that were never trained on. What is
  gained over repeating the content image is what the latents are worth.

{scores_table(scores)}

## Settings
```yaml
{to_yaml(shown).rstrip()}
```
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--start", choices=("random", "linear"), default="random")
    parser.add_argument("--shorten-start", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out: Path = arguments.out
    overrides = [f"data.corpus={json.dumps(arguments.videos)}", *arguments.overrides]
    config = read_settings("reducio_tiny_ft4_fs32", overrides)
    start = None
    if arguments.start == "linear":
        start = start_weights(config, out, arguments.shorten_start)
    options = RunOptions(tell=print, bar=sys.stderr.isatty(), pretrained=start)
    train(config, out / "run", options)

    folder = out / NAME
    # Not the one that validated best: the videos it is scored on shall choose nothing.
    size = export(checkpoints(out / "run" / CHECKPOINTS)[-1], config, folder)
    # The same videos are set apart again, for their names are the same.
    scores = {}
    for px in EVALUATED_PX:
        measured = replace(
            config,
            data=replace(config.data, size_px=px),
            validation=replace(config.validation, clips=EVALUATED_CLIPS),
        )
        measure = RunOptions(tell=print, pretrained=folder, eval_only=True)
        report = train(measured, out / f"evaluation-{px}", measure)
        assert report.scores is not None
        scores[px] = report.scores
    (folder / "README.md").write_text(card(config, out, scores, size))
    gain = gain_db(scores[EVALUATED_PX[0]])
    good = gain >= MIN_GAIN_DB and size < MAX_BYTES
    print(f"{folder}: {size / 1e6:.2f} MB, {gain:+.2f} dB over repeating the content image")
    if good:
        print(f"to bundle it: cp -r {folder} {BUNDLED}/")
    else:
        print(f"not good enough: wanted {MIN_GAIN_DB} dB and less than {MAX_BYTES / 1e6} MB")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
