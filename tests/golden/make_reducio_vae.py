"""Make reducio_vae.npz and reducio_vae.json: the numbers that tests/test_vae_golden.py holds.

The first three runs are excerpts of reference numbers, computed with the published implementation
on rule-made weights; they are read from the folder given. The last one is this implementation's
own, at a width for which there is no reference, made when the others held.

    python tests/golden/make_reducio_vae.py REFERENCE_FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reducio_latents.vae import ReducioVAE, ReducioVAEConfig, Tiling
from reducio_latents.vae.model import centre_image
from reducio_latents.vae.rule_weights import rule_weight

HERE = Path(__file__).parent
REC_STEP = 97
"""Of the reconstructed pixels every 97th is kept, in memory order."""

REFERENCES: dict[str, dict[str, Any]] = {
    "narrow_ft4_64": {"width": 32, "stride": 4, "seed": 7, "shape": [1, 3, 16, 64, 64]},
    "narrow_ft2_64": {"width": 32, "stride": 2, "seed": 8, "shape": [1, 3, 16, 64, 64]},
    "narrow_ft4_tiled_128x96": {
        "width": 32,
        "stride": 4,
        "seed": 10,
        "shape": [1, 3, 16, 128, 96],
        "tile_px": 64,
    },
}
OWN: dict[str, dict[str, Any]] = {
    "own_width8_ft2_tiled_160x32": {
        "width": 8,
        "stride": 2,
        "seed": 3,
        "shape": [1, 3, 16, 160, 32],
        "tile_px": 128,
    },
}


def run(case: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    width, tile_px = case["width"], case.get("tile_px")
    model = ReducioVAE(
        ReducioVAEConfig(
            temporal_stride=case["stride"], width=width, content_width=width, decoder_width=width
        )
    )
    model.load_state_dict({k: rule_weight(k, t.shape) for k, t in model.state_dict().items()})
    noise = np.random.RandomState(case["seed"]).standard_normal(case["shape"])
    video = torch.from_numpy(np.tanh(0.7 * noise)).float()
    tiling = None if tile_px is None else Tiling(tile_px=tile_px)
    with torch.inference_mode():
        posterior = model.encode(video, tiling)
        z = model.final_latents(posterior)
        rec = model.decode(z, centre_image(video), tiling)
    return {
        "mean": posterior.mean.numpy(),
        "logvar": posterior.logvar.numpy(),
        "z": z.numpy(),
        "rec": rec.numpy(),
    }


def digest_of_keys(shapes: dict[str, list[int]]) -> str:
    lines = sorted(f"{key} {tuple(shape)}\n" for key, shape in shapes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def main(reference: Path) -> None:
    arrays: dict[str, Any] = {}
    for name in REFERENCES:
        with np.load(reference / f"{name}.npz") as file:
            arrays |= {f"{name}.{key}": file[key] for key in file}
    for name, case in OWN.items():
        arrays |= {f"{name}.{key}": value for key, value in run(case).items()}
    for key in [key for key in arrays if key.endswith(".rec")]:
        arrays[key] = arrays[key].ravel()[::REC_STEP]
    np.savez_compressed(HERE / "reducio_vae.npz", **arrays)

    keys = {}
    for name in ("ft4", "ft2"):
        shapes = json.loads((reference / f"state_dict_{name}_fs32.json").read_text())
        kept = {key: shape for key, shape in shapes.items() if not key.startswith("loss.")}
        keys[name] = {"keys": len(kept), "sha256": digest_of_keys(kept)}
    content = {"cases": REFERENCES | OWN, "rec_step": REC_STEP, "published": keys}
    (HERE / "reducio_vae.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
