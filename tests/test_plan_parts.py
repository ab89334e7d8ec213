"""A plan's files: the same bytes from the same inputs, committed last, every damage noticed."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import aspect_buckets
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer, LocalFiles
from reducio_latents.files.source import VideoSource
from reducio_latents.store.plan import (
    Plan,
    PlanPart,
    PlanSpec,
    complete_parts,
    edit_part,
    read_plan,
    verify_parts,
    write_part,
)
from reducio_latents.store.plan import parts as parts_module
from reducio_latents.store.plan.parts import part_path

SPEC = PlanSpec(clip=ClipSpec(), buckets=aspect_buckets(16, 256), shard_rows=8)


def make_part(
    count: int, previous: Plan | None = None, spec: PlanSpec = SPEC, root: str = "/corpus"
) -> PlanPart:
    """Plan videos 0 to count - 1, of which every fifth is broken and some are equal."""
    listing, records = [], {}
    for i in range(count):
        name = f"d{i % 3}/{i}.mp4"
        source = VideoSource(f"{root}/{name}")
        listing.append(CorpusVideo(name, source, (f"caption {i} \N{CAT FACE}\t",), {"n": i}))
        records[name] = ProbeRecord(
            codec="h264", width=640, height=360 if i % 2 else 640, rate_fps=30.0,
            duration_s=1.0 + i % 4, frames=30, bytes=9, sha256=f"{i % 10:064x}",
            error=f"{root}/{name}: it is text." if i % 5 == 4 else None,
        )  # fmt: skip
    return plan_part(listing, records, spec, previous)


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def store(files: LocalFiles, *counts: int) -> Plan:
    """Write a plan of one part a count."""
    plan: Plan | None = None
    for number, count in enumerate(counts):
        part = make_part(count, plan)
        write_part(files, number, part)
        plan = plan.extended(part) if plan else Plan.of(part)
    assert plan is not None
    return plan


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    assert read_plan(files) is None
    written = store(files, 20, 50)
    plan = read_plan(files)
    assert plan is not None
    assert plan.parts == 2
    assert plan.spec == written.spec == SPEC
    assert plan.shards() == written.shards()
    assert plan.clips.equals(written.clips)
    assert plan.videos.equals(written.videos)
    assert plan.counts() == written.counts()
    for shard in plan.shards():
        ours = plan.shard_clips(shard.bucket, shard.shard)
        assert ours.to_pylist() == written.shard_clips(shard.bucket, shard.shard).to_pylist()


def test_the_same_inputs_give_the_same_bytes_in_another_process_and_place(tmp_path: Path) -> None:
    store(LocalFiles(tmp_path / "a"), 20, 50)
    script = (
        "from pathlib import Path; from reducio_latents.files import LocalFiles;"
        "from tests.test_plan_parts import *;"
        "plan = None\n"
        "for n, count in enumerate((20, 50)):\n"
        "    part = make_part(count, plan, root='/somewhere/else')\n"
        f"    write_part(LocalFiles(Path({str(tmp_path / 'b')!r})), n, part)\n"
        "    plan = plan.extended(part) if plan else Plan.of(part)\n"
    )
    root = Path(__file__).parents[1]
    environment = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env=environment)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_files_are_ordinary_parquet_that_names_its_spec(tmp_path: Path) -> None:
    store(LocalFiles(tmp_path), 20)
    table = pq.read_table(tmp_path / "plan/part-00000.parquet")
    assert table.num_rows == len(table["clip_id"].unique())
    assert b'"policy":"all"' in table.schema.metadata[b"reducio_latents.plan"]


def test_a_part_is_written_once_and_the_same_one_again_is_no_change(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    store(files, 20)
    before = contents(tmp_path)
    write_part(files, 0, make_part(20))
    assert contents(tmp_path) == before
    with pytest.raises(StoreError, match="another run has planned meanwhile"):
        write_part(files, 0, make_part(21))
    with pytest.raises(StoreError, match="another run has planned meanwhile"):
        write_part(files, 0, make_part(20, spec=replace(SPEC, shard_rows=9)))
    assert contents(tmp_path) == before


def test_a_part_without_the_ones_before_it_is_refused(tmp_path: Path) -> None:
    later = make_part(50, Plan.of(make_part(20)))
    with pytest.raises(StoreError, match="no part 0"):
        write_part(LocalFiles(tmp_path), 1, later)
    with pytest.raises(StoreError, match="part 1 of the plan cannot be stored as part 0"):
        write_part(LocalFiles(tmp_path), 0, later)


class KilledError(Exception):
    """Stands for SIGKILL between two writes."""


@dataclass
class DyingFiles(LocalFiles):
    """Files whose writer is killed before the n-th write."""

    root: Path
    lives: int
    written: list[str] = field(default_factory=list)

    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        self._live(path)
        super().write(path, data)

    def create(self, path: str, data: Buffer | Sequence[Buffer]) -> bool:
        self._live(path)
        return super().create(path, data)

    def delete(self, path: str) -> None:
        self._live(path)
        super().delete(path)

    def _live(self, path: str) -> None:
        if len(self.written) == self.lives:
            raise KilledError
        self.written.append(path)


@pytest.mark.parametrize("lives", [0, 1])
def test_a_run_killed_while_writing_a_part_leaves_the_plan_as_it_was(
    tmp_path: Path, lives: int
) -> None:
    plan = store(LocalFiles(tmp_path / "a"), 20)
    # What was killed had seen more videos than there are at the next try.
    dying = DyingFiles(tmp_path / "a", lives)
    with pytest.raises(KilledError):
        write_part(dying, 1, make_part(60, plan))
    left = read_plan(LocalFiles(tmp_path / "a"))
    assert left is not None
    assert left.clips.equals(plan.clips)
    write_part(LocalFiles(tmp_path / "a"), 1, make_part(50, left))
    store(LocalFiles(tmp_path / "b"), 20, 50)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("lives", [2, 3, 4])
def test_a_run_killed_after_the_clips_were_stored_has_stored_the_part(
    tmp_path: Path, lives: int
) -> None:
    plan = store(LocalFiles(tmp_path / "a"), 20)
    with pytest.raises(KilledError):
        write_part(DyingFiles(tmp_path / "a", lives), 1, make_part(60, plan))
    left = read_plan(LocalFiles(tmp_path / "a"))
    assert left is not None
    store(LocalFiles(tmp_path / "b"), 20, 60)
    assert left.videos.num_rows == 60
    assert verify_parts(LocalFiles(tmp_path / "a")) == []
    complete_parts(LocalFiles(tmp_path / "a"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_an_older_version_left_of_a_part_is_no_obstacle(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "a")
    store(LocalFiles(tmp_path / "b"), 20)
    store(LocalFiles(tmp_path / "c"), 30)
    for kind in ("videos", "sha256"):  # which were written before the clips
        files.write(part_path(kind, 0), LocalFiles(tmp_path / "c").read(part_path(kind, 0)))
    store(files, 20)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    store(files, 20, 50)
    (tmp_path / "plan/videos-00001.parquet").unlink()
    plan = read_plan(files)
    assert plan is not None
    assert plan.shards()
    with pytest.raises(StoreError, match=r"plan/videos-00001\.parquet is missing"):
        _ = plan.videos
    ((name, why),) = verify_parts(files)
    assert name == "plan/videos-00001.parquet"
    assert f"{name} is missing" in why
    (tmp_path / "plan/part-00000.parquet").unlink()
    with pytest.raises(StoreError, match=r"plan/part-00000\.parquet is missing"):
        read_plan(files)


def test_every_flipped_byte_of_what_an_edited_part_was_first_is_found(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    store(files, 20)
    edit_part(files, 0, {"videos": lambda table: table.slice(0, 0)})
    assert verify_parts(files) == []
    path = tmp_path / "plan/sha256-00000.txt"
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert verify_parts(files), position
    for longer in (whole + b"x", whole + b"# x\n"):
        path.write_bytes(longer)
        assert verify_parts(files)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    plan = store(files, 20)
    assert verify_parts(files) == []
    rng = random.Random(0)
    for name, whole in contents(tmp_path).items():
        for _ in range(40):
            position = rng.randrange(len(whole))
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            (tmp_path / name).write_bytes(damaged)
            assert verify_parts(files), f"{name}, byte {position}"
            must_not_mislead(files, plan)
        (tmp_path / name).write_bytes(whole)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    store(files, 20)
    path = tmp_path / "plan/part-00000.parquet"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match=r"part-00000\.parquet is no part of a plan"):
            read_plan(files)


def must_not_mislead(files: LocalFiles, whole: Plan) -> None:
    """Read a damaged plan: what can be read is right, the rest is refused by our own error."""
    try:
        plan = read_plan(files)
        assert plan is not None
        assert (plan.spec, plan.shards()) == (whole.spec, whole.shards())
        assert plan.clips.equals(whole.clips)
        assert plan.videos.equals(whole.videos)
    except StoreError:
        pass


def test_parquet_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    table = make_part(5).clips
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "plan/part-00000.parquet")
    with pytest.raises(StoreError, match="is no part of a plan"):
        read_plan(LocalFiles(tmp_path))


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    store(LocalFiles(tmp_path), 5)
    path = tmp_path / "plan/part-00000.parquet"
    table = pq.read_table(path)
    key = b"reducio_latents.plan"
    text = table.schema.metadata[key].replace(b'"format_version":1', b'"format_version":2')
    metadata = {key: text, key + b".sha256": hashlib.sha256(text).hexdigest()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(StoreError, match="has format 2; this version reads 1"):
        read_plan(LocalFiles(tmp_path))


def test_parts_of_two_specs_are_refused(tmp_path: Path) -> None:
    store(LocalFiles(tmp_path), 5)
    other = replace(SPEC, shard_rows=9)
    part = make_part(9, Plan.of(make_part(5, spec=other)), spec=other)
    write_part(LocalFiles(tmp_path), 1, part)
    with pytest.raises(StoreError, match="other settings than part 0"):
        read_plan(LocalFiles(tmp_path))


def test_shards_are_told_without_reading_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = store(LocalFiles(tmp_path), 20, 50)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a table was read")

    monkeypatch.setattr(parts_module.StoredPart, "group", refuse)
    monkeypatch.setattr(LocalFiles, "read", refuse)
    plan = read_plan(LocalFiles(tmp_path))
    assert plan is not None
    assert plan.shards() == written.shards()


@pytest.mark.parametrize("guess", [8, 100, 1 << 20])
def test_a_footer_of_any_length_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guess: int
) -> None:
    written = store(LocalFiles(tmp_path), 20)
    monkeypatch.setattr(parts_module, "FOOTER_BYTES", guess)
    plan = read_plan(LocalFiles(tmp_path))
    assert plan is not None
    assert plan.shards() == written.shards()
