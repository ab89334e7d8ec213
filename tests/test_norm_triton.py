"""The norm by hand: its numbers, by Triton's interpreter; and code for GPUs, without one."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.vae import norm

triton = pytest.importorskip("triton")

NAME = "reducio_latents.vae.triton_norm"


def test_its_numbers_and_gradients_are_right() -> None:
    tests = Path(__file__).with_name("norm_interpreted.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-xqp", "no:cacheprovider", "--noconftest", tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


def test_a_kernel_that_cannot_be_built_is_said_once_and_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nmore")

    monkeypatch.setattr(norm, "_problems", [])
    monkeypatch.setattr(norm, "takes_triton", lambda x: not norm._problems)
    monkeypatch.setattr(importlib.import_module(NAME), "triton_group_norm", broken)
    layer, x = norm.NormSiLU(8), torch.randn(1, 8, 2, 3, 3)
    expected = F.silu(F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps))
    with caplog.at_level(logging.WARNING):
        assert all(torch.equal(layer(x), expected) for _ in range(3))
    assert [r.getMessage().count("C compiler") for r in caplog.records] == [1]
    assert "\n" not in caplog.records[0].getMessage()


def test_each_kernel_compiles_for_a_gpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton brings the assembler along; only running the code needs a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sys.modules.pop(NAME, None)
    module = importlib.import_module(NAME)
    blocks = {"PIECE": module.PIECE, "ROWS": 64, "COLS": 128}
    kernels = [
        ("_moments", blocks),
        ("_statistics", {"PIECE": module.PIECE, "PARTS": 512, "WIDTH": 4}),
        ("_apply", {**blocks, "SILU": True}),
        ("_slopes", {**blocks, "SILU": True, "SUMS": True}),
        ("_slopes", {**blocks, "SILU": True, "SUMS": False}),
    ]
    types = dict.fromkeys(["sums", "stats", "means"], "*fp32") | {"eps": "fp32"}
    types |= dict.fromkeys(["x", "y", "dy", "dx", "weight", "bias"], "*bf16")
    for name, constants in kernels:
        kernel = getattr(module, name)
        names = [parameter.name for parameter in kernel.params]
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=module.LAUNCH)
        assert len(built.asm["cubin"]) > 1000
