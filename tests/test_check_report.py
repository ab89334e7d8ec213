"""The report is one page that opens offline, plays, sorts, and repeats nothing unescaped."""

from __future__ import annotations

import base64
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from reducio_latents.check.charts import bar_chart, histogram, line_chart, spark_bars, spark_line
from reducio_latents.check.html import render, write_report
from reducio_latents.check.options import CheckOptions, Selection
from reducio_latents.check.report import HISTOGRAM_BINS, Report, build_report
from reducio_latents.cli import main
from reducio_latents.errors import StoreError
from tests.browser import open_browser, require_browser, run, set_width
from tests.spot_check import make_store, moving, record

HOSTILE = '</script><img src=x onerror="document.title=1"> & "quoted" 🎈\ttab \u202eback'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    still = moving(5)[:1].repeat(16, axis=0)
    videos = {f"{n}.mp4": moving(n) for n in range(1, 5)} | {"still.mp4": still}
    videos["bad.mp4"] = moving(9)
    return make_store(
        tmp_path_factory.mktemp("report"),
        videos,
        broken=("bad.mp4",),
        captions={"1.txt": HOSTILE, "2.txt": "a calm sea"},
    )


@pytest.fixture(scope="module")
def report(made: tuple[Path, Path]) -> Report:
    return build_report(made[0], CheckOptions(selection=Selection(num=24)))


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(report, path)
    return path


class Tags(HTMLParser):
    """Collects start tags, and checks that they are closed in order."""

    VOID = {"meta", "input", "img", "br", "polyline", "circle", "rect", "line"}

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_every_clip_is_measured_and_every_failure_listed(report: Report) -> None:
    assert len(report.clips) == 5
    for clip, scores in report.scored:
        assert len(scores.frame_psnr_db) == len(scores.frame_ssim) == 16
        assert scores.psnr_db == pytest.approx(sum(scores.frame_psnr_db) / 16)
        assert sum(clip.histogram) == 16 * 2 * 2 * 3
        assert len(clip.histogram) == HISTOGRAM_BINS
        assert clip.labels == ("original", "decoded", "difference x4")
    assert [(f.video, f.reason) for f in report.failed] == [("bad.mp4", "it was bad")]
    kinds = {warning.kind: warning.clips for warning in report.warnings}
    frozen = [clip.clip.clip_id for clip in report.clips if clip.clip.video == "still.mp4"]
    assert list(kinds["frozen clips"]) == frozen


def test_the_page_needs_nothing_from_elsewhere_and_is_well_formed(page: Path) -> None:
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    assert tags.open == []
    for _, attributes in tags.tags:
        for name in ("src", "href"):
            assert str(attributes.get(name) or "data:").startswith(("data:", "#clip-"))
    assert "default-src 'none'" in page.read_text(encoding="utf-8")
    assert sum(tag == "video" for tag, _ in tags.tags) == 5


def test_the_videos_inside_are_h264_that_browsers_play(report: Report, page: Path) -> None:
    sources = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page.read_text(encoding="utf-8"))
    assert [base64.b64decode(source) for source in sources] == [c.video for c in report.clips]
    assert all(b"avc1" in clip.video for clip in report.clips)


def test_what_the_store_says_is_shown_and_never_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "&lt;/script&gt;&lt;img src=x" in text
    assert "<img" not in text
    assert text.count("</script>") == 1
    assert "\u202e" not in text
    assert r" \u202eback" in text


def test_the_protocol_is_named_and_changes_the_numbers(
    made: tuple[Path, Path], report: Report
) -> None:
    options = CheckOptions(selection=Selection(num=1), protocol="paper")
    paper = build_report(made[0], options)
    assert "Protocol paper" in render(paper)
    assert "Protocol standard" in render(report)


def test_without_originals_the_page_shows_content_images_and_says_why(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    root, corpus = make_store(tmp_path, {"a.mp4": moving(1)})
    corpus.rename(tmp_path / "moved")
    found = build_report(root, CheckOptions())
    assert found.clips[0].labels == ("content image", "decoded")
    text = render(found)
    assert "the corpus is not reachable" in text
    assert "Quality by frame" not in text
    assert 'data-psnr=""' in text


def test_what_was_recorded_while_encoding_is_plotted_and_written_beside_each_clip(
    made: tuple[Path, Path], report: Report, tmp_path: Path
) -> None:
    assert "Recorded while encoding" not in render(report)
    root = tmp_path / "clips.latents"
    shutil.copytree(made[0], root)
    first, second, *_ = (clip.clip.clip_id for clip in report.clips)
    record(root, {first: 31.5, second: 12.25})
    found = build_report(root, CheckOptions(selection=Selection(num=24)))
    assert [clip.recorded_db for clip in found.clips] == [31.5, 12.25, None, None, None]
    text = render(found)
    section = text.partition("Recorded while encoding")[2]
    assert f"2 clips: mean 21.88 dB, lowest 12.25 dB ({second})" in section
    assert section.count("<rect") >= 24
    assert text.count("<dt>dB recorded</dt>") == 2
    assert 'data-recorded="12.25"' in text
    worst = build_report(root, CheckOptions(selection=Selection(num=1, worst=True)))
    assert [clip.clip.clip_id for clip in worst.clips] == [second]


def test_an_untrained_model_is_called_so_on_the_page(report: Report) -> None:
    assert not report.untrained
    assert "untrained" not in render(report)
    assert "random weights: untrained" in render(replace(report, untrained=True))


def test_many_failures_are_counted_and_cut(report: Report) -> None:
    many = replace(report, failed=[report.failed[0]] * 500)
    text = render(many)
    assert "and 300 more: see errors.parquet" in text
    assert "<td>500 clips</td><td>it was bad</td>" in text
    text = render(replace(report, failed=[replace(report.failed[0], clip_id="")]))
    assert "<td>1 video</td><td>it was bad</td>" in text


def test_a_warning_leads_to_its_clips_and_lines_say_how_far_they_go(report: Report) -> None:
    text = render(report)
    frozen = next(clip for clip in report.clips if clip.clip.video == "still.mp4")
    clip_id = frozen.clip.clip_id
    assert f'<a href="#clip-{clip_id}">{clip_id}</a>' in text
    assert f'<article class="card" id="clip-{clip_id}"' in text
    few = render(replace(report, clips=[c for c in report.clips if c is not frozen]))
    assert "#clip-" not in few
    assert frozen.scores is not None
    values = frozen.scores.frame_psnr_db
    assert f"PSNR by frame, {min(values):.2f} to {max(values):.2f}" in text


def test_clips_whose_original_changed_are_counted_and_their_other_number_is_not_large(
    tmp_path: Path,
) -> None:
    root, corpus = make_store(tmp_path, {"a.mp4": moving(1), "b.mp4": moving(2)})
    with (corpus / "a.mp4").open("ab") as file:
        file.write(b"x")
    found = build_report(root, CheckOptions())
    [note] = found.notes
    assert note.startswith(
        "1 of 2 clips have no original to compare with, such as: a.mp4 has changed since it was "
        "encoded"
    )
    assert not note.endswith("..")
    assert render(found).count("<div class=first>") == 1


def test_the_search_for_faults_can_be_of_the_clips_shown_alone(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    options = CheckOptions(selection=Selection(num=2))
    told: list[tuple[int, int]] = []
    everything = build_report(made[0], options, on_scan=lambda *counts: told.append(counts))
    assert told[-1] == (5, 5)
    few = build_report(made[0], replace(options, scan="shown"))
    assert few.notes == ("Faults were looked for among the clips shown alone.",)
    assert few.channel_kl != everything.channel_kl
    same = build_report(made[0], CheckOptions(scan="shown"))
    assert same.channel_kl == pytest.approx(everything.channel_kl)
    arguments = ["check", str(made[0]), "--num", "1", "--scan", "shown"]
    ran = CliRunner().invoke(main, [*arguments, "--report", str(tmp_path / "r.html")])
    assert "among the clips shown alone" in ran.output


def test_the_noise_of_an_untrained_model_is_not_searched_for_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, corpus = make_store(tmp_path, {"a.mp4": moving(1)[:1].repeat(16, axis=0)})
    kinds = {warning.kind for warning in build_report(root, CheckOptions()).warnings}
    assert "frozen clips" in kinds
    corpus.rename(tmp_path / "moved")
    kinds = {warning.kind for warning in build_report(root, CheckOptions()).warnings}
    assert "frozen clips" in kinds
    monkeypatch.setattr("reducio_latents.check.report.is_untrained", lambda _: True)
    found = build_report(root, CheckOptions())
    assert "frozen clips" not in {warning.kind for warning in found.warnings}
    assert "were looked for among 0 of those shown" in found.notes[1]


def test_a_place_that_cannot_be_written_is_one_error(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(StoreError, match="cannot write"):
        write_report(report, tmp_path / "file" / "report.html")
    with pytest.raises(StoreError, match="cannot write"):
        write_report(report, tmp_path)


def test_the_command_writes_the_page(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    ran = CliRunner().invoke(main, ["check", str(made[0]), "--num", "2", "--report", str(out)])
    assert ran.exit_code == 0, ran.output
    assert f"Wrote {out} with 2 clips." in ran.output
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_place_that_cannot_be_written_is_told_before_anything_is_decoded(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("reducio_latents.check.report.build_report", decode)
    (tmp_path / "file").write_text("taken")
    out = tmp_path / "file" / "report.html"
    ran = CliRunner().invoke(main, ["check", str(made[0]), "--report", str(out)])
    assert ran.exit_code == 1
    assert ran.output.startswith(f"Error: cannot write to {tmp_path / 'file'}")


def test_charts_stay_inside_their_frame_and_survive_odd_values() -> None:
    for chart in (
        line_chart({"a": [3.0, 3.0], "b": [1.0]}, x_label="x", y_label="y", title="<t>"),
        histogram([3.0, 3.0, 3.0], x_label="x", title="t"),
        histogram([1.0, 2.0, 30.0], x_label="x", title="t"),
        bar_chart([0.0, -2.0, 5.0], spread=[1.0, 1.0, 1.0], x_label="x", y_label="", title="t"),
    ):
        assert chart is not None
        points = [(p.x, p.y) for line in chart.lines for p in line.points]
        points += [(bar.x, bar.y) for bar in chart.bars]
        points += [(bar.x + bar.width, bar.y + bar.height) for bar in chart.bars]
        assert points
        for x, y in points:
            assert chart.left <= x <= chart.right + 0.1
            assert 0 <= y <= chart.bottom + 0.5
        assert 3 <= len(chart.y_ticks) <= 8
    assert line_chart({"a": []}, x_label="", y_label="", title="") is None
    assert spark_line([1.0], "") is None
    assert spark_bars([0, 0], "") is None


def wait_for(condition: Callable[[], object], what: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


def test_in_a_browser_it_plays_sorts_filters_and_logs_no_error(page: Path, tmp_path: Path) -> None:
    require_browser()
    with open_browser(tmp_path / "profile") as driver:
        driver.get(page.as_uri())
        wait_for(
            lambda: run(driver, "document.querySelector('.card video').currentTime > 0.2"),
            "the first video to play",
        )
        for order, key, sign in [("psnr:up", "psnr", 1), ("psnr:down", "psnr", -1)]:
            _choose(driver, order)
            values = _values(driver, key)
            assert values == sorted(values, key=lambda value: sign * value)
        wait_for(
            lambda: run(driver, "!document.querySelector('.card video').paused"),
            "the video that moved to the top to play on",
        )
        run(driver, "(filter.value = 'calm', filter.dispatchEvent(new Event('input')))")
        assert run(driver, "document.querySelectorAll('.card:not(.hidden)').length") == 1
        assert run(driver, "shown.textContent") == "1 of 5"
        run(driver, "document.getElementById('play').click()")
        assert run(driver, "[...document.querySelectorAll('video')].every(v => v.paused)")
        assert driver.title != "1"
        assert driver.get_log("browser") == []  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_it_fits_a_phone_in_light_and_dark(
    page: Path, tmp_path: Path, dark: bool
) -> None:
    require_browser()
    with open_browser(tmp_path / "profile", 390, dark=dark) as driver:
        driver.get(page.as_uri())
        assert run(driver, "document.documentElement.scrollWidth") <= 390
        card = run(driver, "document.querySelector('.card').getBoundingClientRect().width")
        assert 300 < card <= 390
        set_width(driver, 1280)
        columns = run(
            driver,
            "new Set([...document.querySelectorAll('.card')].map(c => c.offsetLeft)).size",
        )
        assert columns == 2
        paper = run(driver, "getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
        assert (brightness < 60) == dark
        ink = run(driver, "getComputedStyle(document.body).color")
        assert abs(sum(map(int, re.findall(r"\d+", ink)[:3])) / 3 - brightness) > 150


def _choose(driver: object, order: str) -> None:
    run(driver, f"(sort.value = '{order}', sort.dispatchEvent(new Event('change')))")  # type: ignore[arg-type]


def _values(driver: object, key: str) -> list[float]:
    found = run(driver, f"[...document.querySelectorAll('.card')].map(c => +c.dataset.{key})")  # type: ignore[arg-type]
    return [float(value) for value in found]
