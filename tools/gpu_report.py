"""Everything about encoding that needs a GPU, in one call of less than nine minutes.

    python tools/gpu_report.py [--minutes 8] [--model reducio-random:128] > report.md

Needs torch, numpy and this package; frames are made up. Prints Markdown for BENCHMARKS.md: the
matmul that all is measured against, the encoder by precision, layout, compilation and batch, the
error of each against float32 eager, and how busy the GPU is when batches come as in a run. What
there is no time for is named.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from bench_encode import (
    Result,
    Variant,
    bench_encoder,
    load,
    made_up,
    matmul_flops,
    table,
    wait_for,
)

from reducio_latents.encode.gpu import BatchEncoder
from reducio_latents.encode.gpu import Result as Waiting


def busy_share(model: str, device: torch.device, variant: Variant, batch: int) -> str:
    """Feed batches through pinned copies and side streams; return rate and busy share."""
    encoder = BatchEncoder(
        load(model, variant, device, None), pad_to=batch if variant.compiled else None
    )
    frames = made_up(batch, 256)
    encoder.launch(frames)()
    encoder.take_busy_s()
    wait_for(device)
    start, count = time.perf_counter(), 0
    waiting: list[Waiting] = []
    while time.perf_counter() - start < 15 or waiting:
        if time.perf_counter() - start < 15:
            waiting.append(encoder.launch(frames))
        if len(waiting) > 1 or time.perf_counter() - start >= 15:
            count += len(waiting.pop(0)())
    wait_for(device)
    wall = time.perf_counter() - start
    busy = encoder.take_busy_s()
    share = "not measured on a CPU" if busy is None else f"{busy / wall:.1%}"
    return f"{variant.name}, batch {batch}: {count / wall:.1f} clips/s, GPU busy {share}"


def best_of(results: list[Result]) -> Result:
    return max(results[1:], key=lambda result: result.clips_per_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--model", default="reducio-random:128")
    parser.add_argument("--batches", default="4,8,16,32")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here; on a CPU use tools/bench_encode.py.")
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cuda", 0)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name(device)
    matmul = matmul_flops(device, torch.bfloat16)
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"bfloat16 matmul {matmul / 1e12:.0f} TFLOP/s\n", flush=True)
    results = bench_encoder(
        arguments.model,
        device,
        side=256,
        batches=[int(size) for size in arguments.batches.split(",")],
        compiled=True,
        seconds=4.0,
        deadline=deadline - 90,
    )
    print(table(results, matmul), flush=True)
    best = best_of(results)
    print(f"\nbest: {best.variant}, batch {best.batch}")
    if time.monotonic() < deadline - 45:
        compiled = "compiled" in best.variant
        variant = Variant(best.variant, torch.bfloat16, torch.channels_last_3d, compiled)
        print(busy_share(arguments.model, device, variant, best.batch))
    else:
        print("skipped for want of time: busy share")
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    print(f"peak memory of the GPU {peak:.1f} GiB")


if __name__ == "__main__":
    main()
