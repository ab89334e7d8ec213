"""Stores as other trainers' caches, opened by readers written from those trainers' layouts.

Each reader does what its trainer does up to the point where a diffusion model is given latents and
text: there both must be what the store's own readers give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.cli import main
from reducio_latents.conditioning.presets import TEXT_PRESETS
from reducio_latents.core.choices import TrainerFormat
from reducio_latents.core.gaussian import apply_final_rule
from reducio_latents.errors import StoreError
from reducio_latents.files import Files, LocalFiles
from reducio_latents.store import Store
from reducio_latents.store.commit import Failure, ShardKey
from reducio_latents.store.container import array_rows
from reducio_latents.store.meta import ColumnMeta, StoreMeta
from reducio_latents.store.plan import read_plan, write_part
from reducio_latents.store.text_rows import (
    POOLED_MEDIA_TYPE,
    TEXT_MEDIA_TYPE,
    CaptionTokens,
    pack_text_row,
)
from reducio_latents.store.writer import ColumnRows, StoreWriter
from reducio_latents.upkeep.export import EXPORT, ExportReport, export_store
from reducio_latents.upkeep.remove import remove_clips
from reducio_latents.upkeep.trainer_files import TRAINED_FAMILIES, TRAINER_FILES, TrainedFamily
from tests.stores import KilledError, MemoryFiles, finish, plan_part

BUCKET, CHANNELS, GRID = "9x32x64", 3, (2, 1, 2)
CLIPS, SHARD_ROWS, FAILED = 5, 3, 1
"""Clip 1 has no motion."""
MEANS, STDS, SCALING = [0.5, -1.0, 0.25], [2.0, 0.5, 4.0], 0.75
CLASSES = {family.name: name for name, family in TRAINED_FAMILIES.items()}
BOTH: tuple[TrainerFormat, ...] = ("fastvideo", "musubi")
"""One of files of several clips, one of files of one."""
PAIRS = [(name, family) for name, f in TRAINER_FILES.items() for family in f.recipes]


def rule_of(family: str) -> dict[str, Any]:
    if family in ("HunyuanVideo", "CogVideoX"):
        return {"rule": "scale_shift", "scale": SCALING, "shift": 0.0}
    return {"rule": "scale_shift", "scale": [1 / s for s in STDS], "shift": MEANS}


def moments_of(number: int) -> Any:
    values = np.random.RandomState(number).standard_normal((2 * CHANNELS, *GRID))
    return values.astype(np.float16)


def tokens_of(number: int) -> Any:
    return np.random.RandomState(100 + number).standard_normal((2 + number, 4)).astype(np.float16)


def pooled_of(number: int) -> Any:
    return np.random.RandomState(200 + number).standard_normal(6).astype(np.float16)


def columns_of(family: TrainedFamily, texts: bool = True) -> dict[str, ColumnMeta]:
    motion = ColumnMeta(
        kind="array",
        content="moments",
        encoder=f"diffusers:{CLASSES[family.name]}",
        config={},
        row_shapes={BUCKET: (2 * CHANNELS, *GRID)},
        final=rule_of(family.name),
    )
    found = {"motion": motion}
    if texts and family.tokens:
        found["text:other"] = text_column("Other")
        found["text:own"] = text_column(family.tokens[0])
    if texts and family.preset and family.pooled:
        told = {name: recipe.told() for name, recipe in TEXT_PRESETS[family.preset].items()}
        found["text:last"] = found["text:own"]  # of another layer
        found["text:own"] = text_column(family.tokens[0], **told["llama"])
        pooled = text_column(family.pooled[0], **told["clip"])
        found["text:pooled"] = replace(pooled, content=POOLED_MEDIA_TYPE)
    return dict(sorted(found.items()))


def text_column(name: str, values: str = "float16", **told: Any) -> ColumnMeta:
    return ColumnMeta(
        kind="bytes",
        content=TEXT_MEDIA_TYPE,
        encoder=f"transformers:{name}",
        config={"values": values, **told},
        dtype="bytes",
    )


def row_of(column: str, meta: ColumnMeta, number: int) -> Any:
    if column == "motion":
        return None if number == FAILED else moments_of(number)
    values = meta.config["values"]
    vectors = tokens_of(number).astype(np.float32)
    if column == "text:pooled":
        vectors = pooled_of(number).astype(np.float32)[None]
    second = CaptionTokens(np.ones((1, vectors.shape[1]), np.float32), 1)
    return pack_text_row([CaptionTokens(vectors, len(vectors)), second], values)


def write_shards(writer: StoreWriter, only: Sequence[int] | None = None) -> None:
    plan = read_plan(writer.files)
    assert plan is not None
    for shard in plan.shards():
        if only is not None and shard.shard not in only:
            continue
        clips = plan.shard_clips(shard.bucket, shard.shard).to_pylist()
        made = {}
        for name, meta in writer.meta.columns.items():
            rows = [row_of(name, meta, shard.shard * SHARD_ROWS + i) for i in range(len(clips))]
            failed = [
                Failure(row=i, clip_id=c["clip_id"], video=c["video"], reason="it is broken")
                for i, c in enumerate(clips)
                if rows[i] is None
            ]
            made[name] = ColumnRows(rows=rows, failed=failed, statistics={})
        ids = [clip["clip_id"] for clip in clips]
        writer.write_shard(ShardKey(shard.bucket, shard.shard), ids, made)


def begin(files: Files, columns: Mapping[str, ColumnMeta], clips: int = CLIPS) -> StoreWriter:
    write_part(files, 0, plan_part(clips, SHARD_ROWS, BUCKET))
    plan = read_plan(files)
    assert plan is not None
    meta = StoreMeta(shard_rows=SHARD_ROWS, buckets=(BUCKET,), columns=dict(columns))
    return StoreWriter.open(files, meta, array_rows(plan.shards(), SHARD_ROWS))


def make(
    files: Files,
    family: str = "Wan",
    texts: bool = True,
    own: ColumnMeta | None = None,
    extra: Mapping[str, ColumnMeta] = MappingProxyType({}),
) -> Store:
    columns = columns_of(TRAINED_FAMILIES[CLASSES[family]], texts)
    columns |= {**extra, **({"text:own": own} if own else {})}
    writer = begin(files, columns)
    write_shards(writer)
    finish(writer)
    return Store(files)


# What each trainer does with its cache. A reader returns, by clip, what the model is given.

Read = dict[str, tuple[Tensor, Tensor | None, Tensor | None]]
"""Clip -> final latents (D, t, h, w), token vectors, pooled vector."""


def own_values(store: Store, family: str) -> Read:
    """Return what the store's own readers say, by clip."""
    found: Read = {}
    ids = store.plan.clips["clip_id"].to_pylist()
    for number, clip in enumerate(ids):
        if number != FAILED:
            mean = torch.from_numpy(moments_of(number))[:CHANNELS]
            final = apply_final_rule(rule_of(family), mean[None])[0]
            tokens, pooled = (torch.from_numpy(f(number)) for f in (tokens_of, pooled_of))
            found[clip] = (final, tokens, pooled if "text:pooled" in store.columns else None)
    return found


def normalised(z: Tensor, family: str) -> Tensor:
    """What training does to raw latents (B, D, ...), by the model's own config."""
    if family in ("HunyuanVideo", "CogVideoX"):
        return z.float() * SCALING
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (MEANS, STDS))
    return (z.float() - mean) / std


def mode(moments: Tensor) -> Tensor:
    """The mode of diffusers' DiagonalGaussianDistribution over (B, 2D, ...)."""
    return moments.chunk(2, dim=1)[0]


def read_fastvideo(root: Path, family: str) -> Read:
    found: Read = {}
    for path in sorted(root.rglob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            [row] = file.read_row_group(group).to_pylist()
            tensors = []
            for name in ("vae_latent", "text_embedding"):
                values = np.frombuffer(row[f"{name}_bytes"], np.float32)
                tensors.append(torch.from_numpy(values.reshape(row[f"{name}_shape"]).copy()))
            assert (row["width"], row["height"], row["num_frames"]) == (64, 32, 9)
            assert (row["fps"], row["duration_sec"], row["media_type"]) == (16, 9 / 16, "video")
            assert re.fullmatch(r"caption \d", row["caption"])
            found[row["id"]] = (normalised(tensors[0][None], family)[0], tensors[1], None)
    return found


def read_musubi(root: Path, family: str) -> Read:
    architecture = {"Wan": "wan", "HunyuanVideo": "hv"}[family]
    found: Read = {}
    for path in sorted(root.glob(f"*_{architecture}.safetensors")):
        tokens = path.name.split("_")
        assert tuple(map(int, tokens[-2].split("x"))) == (64, 32)
        assert tuple(map(int, tokens[-3].split("-")[:2])) == (0, 9)
        item = "_".join(tokens[:-3])
        text = root / f"{item}_{architecture}_te.safetensors"
        batch: dict[str, Tensor] = {}
        for key, value in {**load_file(path), **(load_file(text) if text.exists() else {})}.items():
            name = key.replace("varlen_", "")
            name = name if name.endswith("_mask") else name.rsplit("_", 1)[0]
            batch[name.rsplit("_", 1)[0] if name.startswith("latents_") else name] = value
        latents = batch["latents"]
        if family == "Wan":
            found[item] = (latents, batch.get("t5"), None)
        else:
            vectors = batch["llm"][batch["llm_mask"].bool()]
            assert len(batch["llm"]) == 256
            found[item] = (latents.float() * SCALING, vectors, batch["clipL"])
    return found


def read_finetrainers(root: Path, family: str) -> Read:
    folder, found = root / "finetrainers-precomputed-data", {}
    count = len(list(folder.glob("latent-*.pt")))
    ids = [clip for i, clip in enumerate(sorted_ids(CLIPS)) if i != FAILED]
    for index in range(count):
        latent, condition = (
            torch.load(folder / f"{kind}-{index}.pt", weights_only=True)
            for kind in ("latent", "condition")
        )
        moments = latent["latents"]
        if family == "CogVideoX":
            moments = moments.permute(0, 2, 1, 3, 4)
        z = mode(moments).float()
        if family == "Wan":
            mean, scale = latent["latents_mean"], latent["latents_std"]
            z = (z - mean.view(1, -1, 1, 1, 1)) * scale.view(1, -1, 1, 1, 1)
        elif family == "LTX-Video":
            mean, std = latent["latents_mean"], latent["latents_std"]
            z = (z - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
            assert (latent["num_frames"], latent["height"], latent["width"]) == GRID
        else:
            z = z * SCALING
        vectors = condition["encoder_hidden_states"]
        lengths = {"Wan": 512, "LTX-Video": 128, "HunyuanVideo": 256, "CogVideoX": 226}
        assert vectors.shape[:2] == (1, lengths[family])
        if family in ("LTX-Video", "HunyuanVideo"):
            assert condition["encoder_attention_mask"].dtype == torch.bool
            vectors = vectors[condition["encoder_attention_mask"]][None]
        pooled = condition.get("pooled_projections")
        found[ids[index]] = (z[0], vectors[0], None if pooled is None else pooled[0])
    return found


def read_ltx(root: Path, family: str) -> Read:
    found: Read = {}
    for path in sorted((root / "latents").iterdir()):
        latent = torch.load(path, map_location="cpu", weights_only=True)
        steps, height, width = (latent[k] for k in ("num_frames", "height", "width"))
        values = latent["latents"]
        if family == "LTX-Video":  # (B, cells, D): what the trainer takes as it is
            assert values.shape == (steps * height * width, CHANNELS)
            values = values.reshape(steps, height, width, -1).permute(3, 0, 1, 2)
        assert latent["fps"] == 16.0
        text = None
        if family == "LTX-Video":
            condition = torch.load(root / "conditions" / path.name, weights_only=True)
            assert condition["prompt_embeds"].shape[0] == 256
            text = condition["prompt_embeds"][condition["prompt_attention_mask"]]
        found[path.stem] = (values, text, None)
    return found


def read_diffusers(root: Path, family: str) -> Read:
    found: Read = {}
    lines = [(root / name).read_text().splitlines() for name in ("prompts.txt", "videos.txt")]
    for _, video in zip(*lines, strict=True):
        name = f"{Path(video).name.split('.')[0]}.pt"
        latents = torch.load(root / "video_latents" / name, weights_only=True)
        embeds = root / "prompt_embeds" / name
        text = torch.load(embeds, weights_only=True) if embeds.exists() else None
        found[name[:-3]] = (normalised(mode(latents[None]), family)[0], text, None)
    return found


READERS: dict[TrainerFormat, Callable[[Path, str], Read]] = {
    "fastvideo": read_fastvideo,
    "musubi": read_musubi,
    "finetrainers": read_finetrainers,
    "ltx": read_ltx,
    "diffusers-pt": read_diffusers,
}


def sorted_ids(count: int) -> list[str]:
    ids: list[str] = plan_part(count, SHARD_ROWS, BUCKET).clips["clip_id"].to_pylist()
    return ids


@pytest.mark.parametrize(("name", "family"), PAIRS, ids=lambda value: str(value))
def test_a_trainer_sees_what_the_store_says(
    name: TrainerFormat, family: str, tmp_path: Path
) -> None:
    store = make(MemoryFiles(), family)
    report = export_store(store, LocalFiles(tmp_path), name)
    assert str(report) == "5 found = 4 converted + 0 skipped + 1 failed"
    assert report.failed == {"motion failed": 1}
    found, own = READERS[name](tmp_path, family), own_values(store, family)
    assert found.keys() == own.keys()
    for clip, (latents, tokens, pooled) in found.items():
        wanted, wanted_tokens, wanted_pooled = own[clip]
        torch.testing.assert_close(latents, wanted, rtol=1e-6, atol=1e-6)
        if tokens is None or wanted_tokens is None:
            assert TRAINER_FILES[name].recipes[family].without_text
            continue
        padded = F.pad(wanted_tokens, (0, 0, 0, len(tokens) - len(wanted_tokens)))
        assert torch.equal(tokens, padded.to(tokens.dtype))
        if pooled is not None:
            assert wanted_pooled is not None
            assert torch.equal(pooled, wanted_pooled)
    has_text = not TRAINER_FILES[name].recipes[family].without_text
    assert report.text[:1] == (("text:own",) if has_text else ())


def test_fastvideo_has_the_columns_that_its_reader_asks_for(tmp_path: Path) -> None:
    export_store(make(MemoryFiles()), LocalFiles(tmp_path), "fastvideo")
    [path, _] = sorted(tmp_path.rglob("*.parquet"))
    assert pq.read_schema(path).names == [
        "id",
        *(f"vae_latent_{x}" for x in ("bytes", "shape", "dtype")),
        *(f"text_embedding_{x}" for x in ("bytes", "shape", "dtype")),
        *("file_name", "caption", "media_type", "width", "height", "num_frames"),
        *("duration_sec", "fps"),
    ]
    assert pq.read_schema(path).field("vae_latent_shape").type == pa.list_(pa.int64())


@pytest.mark.parametrize("name", TRAINER_FILES)
def test_an_export_that_is_killed_at_any_write_ends_with_the_same_bytes(
    name: TrainerFormat,
) -> None:
    family = next(iter(TRAINER_FILES[name].recipes))
    store, undisturbed = make(MemoryFiles(), family), MemoryFiles("target")
    export_store(store, undisturbed, name)
    assert undisturbed.writes >= 3
    for number in range(1, undisturbed.writes + 1):
        target = MemoryFiles("target")
        target.fail_at = number
        with pytest.raises(KilledError):
            export_store(store, target, name)
        target.fail_at = None
        report = export_store(store, target, name)
        assert target.data == undisturbed.data, f"killed at write {number}"
        assert report.converted + report.skipped == CLIPS - 1
    again = export_store(store, target, name)
    assert (again.converted, again.skipped) == (0, CLIPS - 1)
    assert target.data == undisturbed.data


@pytest.mark.parametrize("name", TRAINER_FILES)
def test_without_text_latents_come_alone_and_it_is_said(
    name: TrainerFormat, tmp_path: Path
) -> None:
    family = next(iter(TRAINER_FILES[name].recipes))
    store = make(MemoryFiles(), family, texts=False)
    report = export_store(store, LocalFiles(tmp_path), name)
    assert report.converted == CLIPS - 1
    assert (report.text, "no column has token vectors" in report.missing_text) == ((), True)
    captions: dict[str, Callable[[], list[str]]] = {
        "ltx": lambda: [row["caption"] for row in json.loads(read("dataset.json"))],
        "musubi": lambda: [json.loads(row)["caption"] for row in read("dataset.jsonl").split("\n")],
        "diffusers-pt": lambda: read("prompts.txt").split("\n"),
    }

    def read(path: str) -> str:
        return (tmp_path / path).read_text().strip()

    if name in captions:
        assert captions[name]() == ["caption 0", "caption 2", "caption 3", "caption 4"]


def test_text_needs_every_vector_that_its_trainer_takes() -> None:
    store = make(MemoryFiles(), "HunyuanVideo")
    columns = {n: c for n, c in store.meta.columns.items() if n != "text:pooled"}
    store.meta = replace(store.meta, columns=columns)
    report = export_store(store, MemoryFiles(), "musubi")
    assert report.missing_text == (
        "no column has pooled vectors of CLIPTextModel made with --text-preset hunyuan"
    )
    assert export_store(store, MemoryFiles(), "fastvideo").text == ("text:own",)


def test_text_is_taken_from_the_column_that_was_made_as_the_model_wants_it() -> None:
    padded = text_column("T5EncoderModel")
    padded = replace(padded, config={**padded.config, "pads": True})
    plain = export_store(make(MemoryFiles(), "CogVideoX"), MemoryFiles(), "finetrainers")
    assert plain.lost.startswith("vectors of padding, which --text-preset cogvideox would make")
    for family, column in (("CogVideoX", "text:padded"), ("LTX-Video", "text:own")):
        store = make(MemoryFiles(), family, extra={"text:padded": padded})
        report = export_store(store, MemoryFiles(), "finetrainers")
        assert report.text == (column,)
        assert "vectors of padding" not in report.lost
    layer = text_column("UMT5EncoderModel")
    layer = replace(layer, config={**layer.config, "layer": -2})
    report = export_store(make(MemoryFiles(), own=layer), MemoryFiles(), "musubi")
    assert "made with --text-preset wan" in report.missing_text


def test_bfloat16_vectors_stay_bfloat16(tmp_path: Path) -> None:
    own = text_column("UMT5EncoderModel", "bfloat16")
    export_store(make(MemoryFiles(), own=own), LocalFiles(tmp_path), "musubi")
    path = next(tmp_path.glob("*_te.safetensors"))
    assert load_file(path)["varlen_t5_bfloat16"].dtype == torch.bfloat16


def test_clips_that_were_removed_go_and_those_that_come_later_are_added() -> None:
    files, target = MemoryFiles(), MemoryFiles("target")
    writer = begin(files, columns_of(TRAINED_FAMILIES[CLASSES["Wan"]]))
    write_shards(writer, only=[0])
    finish(writer)
    for name in BOTH:
        target = MemoryFiles(name)
        report = export_store(Store(files), target, name)
        assert report.failed == {"motion failed": 1, "motion not encoded yet": 2}
    write_shards(writer, only=[1])
    report = export_store(Store(files), target, "musubi")
    assert (report.converted, report.skipped) == (2, 2)


def test_a_takedown_reaches_an_export(tmp_path: Path) -> None:
    make(LocalFiles(tmp_path / "store"))
    gone, kept = sorted_ids(CLIPS)[0], sorted_ids(CLIPS)[2]
    formats: tuple[TrainerFormat, ...] = (*BOTH, "finetrainers")
    targets = {name: MemoryFiles(name) for name in formats}
    for name, target in targets.items():
        export_store(Store(LocalFiles(tmp_path / "store")), target, name)
    remove_clips(tmp_path / "store", clip_ids=[gone])
    store = Store(LocalFiles(tmp_path / "store"))
    for name in BOTH:
        held = b"".join([*map(str.encode, targets[name].data), *targets[name].data.values()])
        assert gone.encode() in held
        report = export_store(store, targets[name], name)
        assert report.found == CLIPS - 1
        held = b"".join([*map(str.encode, targets[name].data), *targets[name].data.values()])
        assert gone.encode() not in held
        assert kept.encode() in held
    with pytest.raises(StoreError, match="before its columns or clips changed"):
        export_store(store, targets["finetrainers"], "finetrainers")  # whose files have numbers


def test_a_damaged_row_costs_its_clip() -> None:
    source = MemoryFiles()
    store = make(source)
    path = store.commit(ShardKey(BUCKET, 0), "motion").file
    source.data[path] = b"!" + source.data[path][1:]
    for name in BOTH:
        target = MemoryFiles()
        for _ in range(2):
            report = export_store(store, target, name)
            assert str(report).endswith("2 failed")
            assert any("does not match its checksum" in reason for reason in report.failed)


def test_a_model_that_the_trainer_does_not_know_is_refused_in_one_line() -> None:
    store = make(MemoryFiles("wan.latents"), "CogVideoX")
    with pytest.raises(StoreError) as caught:
        export_store(store, MemoryFiles(), "musubi")
    assert str(caught.value) == (
        "--format musubi is for latents of Wan, HunyuanVideo; those of wan.latents were made by "
        "diffusers:AutoencoderKLCogVideoX. For these there is --format finetrainers or "
        "diffusers-pt."
    )
    columns = {"motion": replace(store.meta.columns["motion"], encoder="reducio-ft4-fs32")}
    store.meta = replace(store.meta, columns=columns)
    with pytest.raises(StoreError, match=r"were made by reducio-ft4-fs32\.$"):
        export_store(store, MemoryFiles(), "ltx")


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    store, target = make(MemoryFiles()), MemoryFiles("target")
    export_store(store, target, "musubi")
    with pytest.raises(StoreError, match="an export in another format"):
        export_store(store, target, "fastvideo")
    with pytest.raises(StoreError, match="of another store"):
        export_store(make(MemoryFiles(), "HunyuanVideo"), target, "musubi")
    other = MemoryFiles("other")
    other.write("notes.txt", b"mine")
    with pytest.raises(StoreError, match=r"holds something else \(notes.txt\)"):
        export_store(store, other, "musubi")
    assert json.loads(target.read(EXPORT))["format"] == "musubi"


def test_the_command_says_what_is_carried_and_what_is_lost(tmp_path: Path) -> None:
    make(LocalFiles(tmp_path / "store"))
    words = ["convert", f"{tmp_path}/store", f"{tmp_path}/out", "--format", "musubi"]
    for counts in ("4 converted + 0 skipped", "0 converted + 4 skipped"):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        assert f"5 found = {counts} + 1 failed" in result.output
        assert "text   from text:own" in result.output
        assert "lost   log-variance" in result.output
    reference = CliRunner().invoke(main, [*words, "--reference"])
    assert reference.exit_code == 1
    assert "Encode the videos, then convert" in reference.output


def test_counts_add_up() -> None:
    report = ExportReport(found=3, converted=1, skipped=1)
    report.failed["x"] = 1
    assert str(report) == "3 found = 1 converted + 1 skipped + 1 failed"
