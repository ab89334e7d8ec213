#!/usr/bin/env python
"""Train the small model that the package ships, measure it, and pack it up.

    python tools/train_tiny.py VIDEOS --out DIR [--set train.steps=20000 ...]

VIDEOS is any corpus. Whole videos are set apart for validation, by a hash of their names. The run
is in DIR/run and continues when the command is given again. DIR/reducio-tiny-ft4-fs32 then holds
`model.safetensors` (the average of the weights, float16), `config.json` with its fingerprint, and
`README.md`, a card that says on what and how it was trained and how good it is. The scores on it
are of the float16 weights as they were written. Copied to reducio_latents/autoencoders/bundled/,
that folder is the model `reducio-tiny-ft4-fs32`, and what the quickstart uses.

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
sys.path.insert(0, str(ROOT))  # this checkout, installed or not

from reducio_latents import __version__  # noqa: E402
from reducio_latents.autoencoders.bundled import FOLDER  # noqa: E402
from reducio_latents.autoencoders.checkpoint import write_weights  # noqa: E402
from reducio_latents.files import open_files  # noqa: E402
from reducio_latents.plan import read_plan  # noqa: E402
from reducio_latents.train.config import TrainConfig  # noqa: E402
from reducio_latents.train.loop import RunOptions, train  # noqa: E402
from reducio_latents.train.settings import read_settings, to_yaml  # noqa: E402
from reducio_latents.vae.weights import open_state_dict  # noqa: E402

NAME = "reducio-tiny-ft4-fs32"
MIN_GAIN_DB = 3.0
MAX_BYTES = 8_000_000


def export(checkpoint: Path, config: TrainConfig, folder: Path) -> int:
    """Write a checkpoint's averaged weights as float16; return their size in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    averaged = checkpoint / "ema"
    state = open_state_dict(averaged if averaged.exists() else checkpoint / "model")
    half = {key: state.read(key).to(torch.float16) for key in state.shapes}
    write_weights(half, config.model, folder)
    return (folder / "model.safetensors").stat().st_size


def card(config: TrainConfig, out: Path, scores: dict[str, float], size: int) -> str:
    """Return the model's card."""
    plan = read_plan(open_files(out / "run"))
    assert plan is not None
    description = json.loads((out / NAME / "config.json").read_text())
    # Where the videos lay is nobody's business.
    shown = replace(config, data=replace(config.data, corpus=Path(str(config.data.corpus)).name))
    step = (out / "run" / "checkpoints" / "best").resolve().name.removeprefix("step-")
    validation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    gain = scores["clip_psnr_db"] - scores["content_psnr_db"]
    return f"""# {NAME}

A Reducio-VAE of {size / 1e6:.1f} MB, for trying `reducio-latents` out: its pictures are those of a
trained model, its quality is not that of the published ones. Not for production, and not for
judging the architecture.

- Sizes: {config.model}
- Fingerprint: `{description["fingerprint"]}`
- Trained by `tools/train_tiny.py` of reducio-latents {__version__}, step {int(step)}, on
  {plan.counts().videos["planned"]} videos less those of the validation; weights are a running
  average ({config.train.ema_decay}), in float16.
- Validation: {validation["clips"]} clips of {config.data.size_px} px, of whole videos that were
  never trained on.

| | |
|---|--:|
| PSNR, mean over frames | {scores["psnr_db"]:.2f} dB |
| SSIM | {scores["ssim"]:.3f} |
| PSNR of whole clips | {scores["clip_psnr_db"]:.2f} dB |
| the same, repeating the content image | {scores["content_psnr_db"]:.2f} dB |
| gain over repeating the content image | {gain:.2f} dB |

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
    arguments = parser.parse_args()
    out: Path = arguments.out
    overrides = [f"data.corpus={json.dumps(arguments.videos)}", *arguments.overrides]
    config = read_settings("reducio_tiny_ft4_fs32", overrides)
    options = RunOptions(tell=print, bar=sys.stderr.isatty())
    train(config, out / "run", options)

    folder = out / NAME
    size = export(out / "run" / "checkpoints" / "best", config, folder)
    # A folder of its own, with the run's plan in it, so that the videos set apart are the same.
    shutil.copytree(out / "run" / "plan", out / "evaluation" / "plan", dirs_exist_ok=True)
    measure = RunOptions(tell=print, pretrained=folder, eval_only=True)
    report = train(config, out / "evaluation", measure)
    assert report.scores is not None
    (folder / "README.md").write_text(card(config, out, report.scores, size))
    gain = report.scores["clip_psnr_db"] - report.scores["content_psnr_db"]
    good = gain >= MIN_GAIN_DB and size < MAX_BYTES
    print(f"{folder}: {size / 1e6:.2f} MB, {gain:+.2f} dB over repeating the content image")
    if good:
        print(f"to bundle it: cp -r {folder} {FOLDER}/")
    else:
        print(f"not good enough: wanted {MIN_GAIN_DB} dB and less than {MAX_BYTES / 1e6} MB")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
