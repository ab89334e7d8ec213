"""The command line: quick help, one line an error, exit codes that scripts can trust."""

from __future__ import annotations

import ast
import dataclasses
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from reducio_latents import cli
from reducio_latents.cli import COMMANDS, main
from reducio_latents.cli.options import FieldOption, takes
from reducio_latents.cli.show import safe
from reducio_latents.conditioning.options import TextOptions
from reducio_latents.core.clips import ClipSpec
from reducio_latents.encode import EncodeOptions
from tests.corpora import write_corpus, write_video
from tests.forked import Python

FAST = ["--model", "reducio-random:8", "--resolution", "32", "--shard-rows", "2"]


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "sample.latents"
    result = invoke("encode-corpus", corpus, path, *FAST, "--max-failed", "0.5")
    assert result.exit_code == 0, result.output
    assert "videos  6 found = 3 encoded + 2 skipped + 1 failed" in result.output
    return path


def python(*words: str) -> tuple[str, float]:
    """Run Python; return what it printed, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return run.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_little_cpu_time_and_names_every_command() -> None:
    _, least_s = python("-c", "import click")
    shown, used_s = python("-m", "reducio_latents", "--help")
    assert all(name in shown for name in COMMANDS)
    assert used_s < 8 * least_s  # torch alone takes 30 times as long


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def options_of(name: str) -> list[click.Option]:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return [param for param in command.params if isinstance(param, click.Option)]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from reducio_latents.cli import COMMANDS, main\n"
        "HEAVY = 'torch', 'numpy', 'pyarrow', 'PIL', 'zarr', 'av', 'transformers', 'obstore'\n"
        "for words in ([], *([name] for name in COMMANDS)):\n"
        "    main([*words, '--help'], standalone_mode=False)\n"
        "    loaded = sys.modules.keys() & {*HEAVY}\n"
        "    assert not loaded, (words, loaded)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_made_from_a_field_has_help(name: str) -> None:
    for option in options_of(name):
        if not isinstance(option, FieldOption):
            continue
        field = str(option.name).rpartition("__")[2]
        assert field in {known.name for known in dataclasses.fields(option.owner)}
        context = click.Context(click.Command(name))
        record = option.get_help_record(context)
        assert record is not None
        assert not record[1].startswith("  ["), f"{option.owner.__name__}.{field} has no note"


def test_no_default_is_written_in_the_command_line() -> None:
    for path in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("option"):
                continue
            for keyword in node.keywords:
                where = f"{path.name}:{node.lineno}"
                assert keyword.arg != "show_default", where
                assert keyword.arg != "default" or ast.unparse(keyword.value) == "None", where


def test_what_is_given_reaches_the_dataclass_and_the_rest_is_its_default() -> None:
    got: list[EncodeOptions] = []

    @click.command()
    @takes(EncodeOptions, {"Options": "model gpus columns clip.frames text.values retry_failed"})
    def probe(options: EncodeOptions) -> None:
        got.append(options)

    words = "--gpus all --columns motion,text --columns caption --frames 8 --text-values int8"
    for line in ("", words, "--gpus 2 --retry-failed"):
        assert CliRunner().invoke(probe, line).exit_code == 0
    assert got == [
        EncodeOptions(),
        EncodeOptions(
            gpus="all",
            columns=("motion", "text", "caption"),
            clip=ClipSpec(frames=8),
            text=TextOptions(values="int8"),
        ),
        EncodeOptions(gpus=2, retry_failed=True),
    ]
    for line in ("--gpus many", "--columns ,", "--text-values int4", "--frames 1.5"):
        assert CliRunner().invoke(probe, line).exit_code == 2


def test_encode_corpus_shows_the_everyday_options_first() -> None:
    text = invoke("encode-corpus", "--help").output
    first, *headed = re.split(r"\n\n(?=\w[\w ]+:\n)", text.partition("\nOptions:\n")[2])
    assert {"--model", "--weights", "--dtype", "--batch-size"} <= set(re.findall(r"--\S+", first))
    assert len(re.findall(r"^  -", first, re.MULTILINE)) <= 15
    assert len(headed) >= 4


def test_too_many_failures_exit_with_3_and_say_so(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mp4", 1.1)
    (tmp_path / "videos" / "b.mp4").write_bytes(b"nothing")
    result = invoke("encode-corpus", tmp_path / "videos", tmp_path / "store", *FAST)
    assert result.exit_code == 3
    assert "50% failed, more than --max-failed 10%" in result.output


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["encode-corpus"], 2, "Missing argument"),
        (["encode-corpus", "nowhere", "s", *FAST], 1, "nowhere"),
        (["encode-corpus", ".", "s", "--model", "reducio"], 1, "weights"),
        (["encode-corpus", ".", "s", *FAST, "--resolution", "250"], 1, "multiple of 32"),
        (["encode-corpus", ".", "s", *FAST, "--clips", "evrey"], 1, "policy"),
        (["encode-corpus", ".", "s", *FAST, "--columns", "motoin"], 1, "did you mean"),
        (["encode-corpus", ".", "s", *FAST, "--device", "cuda:99"], 1, "cuda:99"),
        (["info", "nowhere"], 1, "not a latent store"),
        (["verify", "setup.cfg"], 1, "not a latent store"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_errors_are_one_line_with_the_right_exit_code(
    words: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", 1.1)
    (tmp_path / "setup.cfg").write_text("[x]")
    monkeypatch.chdir(tmp_path)
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert says in result.output
    assert "Traceback" not in result.output
    if code == 1:
        assert len(result.output.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "setup.cfg"]


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 torn"])
def test_something_that_is_no_weights_file_is_one_line(
    corpus: Path, tmp_path: Path, content: bytes
) -> None:
    weights = tmp_path / "weights.ckpt"
    weights.write_bytes(content)
    result = invoke(
        "encode-corpus", corpus, tmp_path / "s", "--model", "reducio", "--weights", weights
    )
    assert result.exit_code == 1
    assert "weights.ckpt" in result.output
    assert not (tmp_path / "s").exists()


def test_info_status_and_verify_describe_the_store(store: Path) -> None:
    info = invoke("info", store)
    assert info.exit_code == 0
    assert "reducio-random:8" in info.output
    assert "32x4x1x1" in info.output
    status = invoke("status", store)
    assert status.exit_code == 0
    assert "all done" in status.output
    verified = invoke("verify", store)
    assert verified.exit_code == 0
    assert "all sound" in verified.output


def test_verify_names_the_file_and_the_clip_that_a_flipped_byte_costs(
    store: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", store, copy], check=True)
    shard = copy / "16x32x32" / "motion" / "c" / "0" / "0" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    result = invoke("verify", copy)
    assert result.exit_code == 1
    assert str(shard) in result.output
    assert "costs 1 clips" in result.output


def test_a_dry_run_prints_what_would_be_done_and_does_nothing(corpus: Path, tmp_path: Path) -> None:
    for command in ("plan", "encode-corpus"):
        result = invoke(command, corpus, tmp_path / "s", "--resolution", "32", "--dry-run")
        assert result.exit_code == 0, result.output
        assert re.search(r"6 found: \d planned, 1 without a clip, ", result.output)
        assert "hours" in result.output
        assert "16x32x32: 4 clips" in result.output
    assert not (tmp_path / "s").exists()


def test_a_store_that_cannot_be_written_is_one_line(corpus: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/no-such-place")
    else:
        target = tmp_path / "locked" / "store"
        target.parent.mkdir(mode=0o500)
    result = invoke("encode-corpus", corpus, target, *FAST)
    assert result.exit_code == 1
    assert "cannot write" in result.output
    assert "Traceback" not in result.output


def test_a_missing_video_library_is_one_error_and_no_fault_of_the_videos(tmp_path: Path) -> None:
    videos, store = tmp_path / "videos", tmp_path / "store.latents"
    videos.mkdir()
    for name in "abc":
        (videos / f"{name}.mp4").write_bytes(b"a video, for all that anyone can tell")
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "av.py").write_text("raise ModuleNotFoundError('No module named av', name='av')")
    command = [sys.executable, "-m", "reducio_latents", "encode-corpus", str(videos), str(store)]
    run = subprocess.run(
        [*command, "--model", "reducio-random:8", "--resolution", "32", "--workers", "1"],
        env=os.environ | {"PYTHONPATH": str(missing)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    (error,) = [line for line in run.stderr.splitlines() if "Error" in line]
    assert "pip install 'reducio-latents[encode]'" in error
    assert "Traceback" not in run.stderr
    assert not (store / "plan").exists()


HOSTILE = "\x1b]0;pwned\x07\x1b[2J\u202e\x9b31m\n.mp4"
"""A name that retitles and clears a terminal, turns text around and begins a line of its own."""
OBEYED = re.compile("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus whose names are hostile, sound and broken ones, and its store."""
    root = tmp_path_factory.mktemp("hostile")
    corpus = root / f"corpus{HOSTILE}"
    write_video(corpus / f"a{HOSTILE}", 1.1)
    write_video(corpus / f"short{HOSTILE}", 0.2)
    (corpus / f"b{HOSTILE}").write_bytes(b"nothing")
    store = root / f"store{HOSTILE}"
    assert invoke("encode-corpus", corpus, store, *FAST).exit_code == 3
    return corpus, store


@pytest.mark.parametrize(
    "words",
    [
        ["encode-corpus", "{corpus}", "{other}", *FAST],
        ["encode-corpus", "{corpus}", "{store}", *FAST, "--retry-failed"],
        ["encode-corpus", "{corpus}", "{store}", *FAST, "--fps", "8"],
        ["encode-corpus", "{corpus}", "{corpus}/none/*.mp4"],
        ["encode-corpus", "{corpus}", "{store}", "--dtype", "{hostile}"],
        ["plan", "{corpus}", "{other}", "--resolution", "32", "-n"],
        ["add-column", "{store}", "text", "--text-model", "{hostile}"],
        ["status", "{store}"],
        ["info", "{store}"],
        ["info", "{store}", "--json"],
        ["info", "{corpus}"],
        ["verify", "{store}"],
        ["stats", "{store}"],
        ["stats", "{store}", "--json"],
        ["decode", "{store}", "--out", "{out}", "--corpus", "{hostile}"],
        ["decode", "{store}", "--out", "{out}", "--ids", "{hostile}"],
        ["check", "{store}", "--report", "{out}.html"],
        ["evaluate", "x{hostile}={corpus}", "--model", "bicubic-32x", "--resolution", "64",
         "--metrics", "psnr", "--out", "{out}"],
        ["convert", "{store}", "{out}", "--format", "webdataset"],
        ["convert", "{corpus}", "{out}", "--reference"],
        ["import-checkpoint", "{corpus}/b{hostile}", "{out}"],
        ["bench", "--model", "{hostile}"],
        ["train", "{hostile}"],
        ["{hostile}"],
    ],
    ids=lambda words: "-".join(words[:1] + words[-1:])[:40].replace("{", "").replace("}", ""),
)  # fmt: skip
def test_no_command_prints_what_a_terminal_would_obey(
    words: list[str], hostile: tuple[Path, Path], tmp_path: Path
) -> None:
    named = {"corpus": hostile[0], "store": hostile[1], "other": tmp_path / "other"}
    result = invoke(
        *(word.format(hostile=HOSTILE, out=tmp_path / f"out{HOSTILE}", **named) for word in words)
    )
    assert result.output.strip()
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert not OBEYED.search(result.output), ascii(result.output)
    assert "\n.mp4" not in result.output


def test_a_warning_of_a_log_is_printed_without_what_a_terminal_obeys() -> None:
    code = (
        "import logging\n"
        "from reducio_latents.cli.show import one_line\n"
        "with one_line():\n"
        f"    logging.getLogger('reducio_latents').warning('lost %s', {HOSTILE!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.startswith("lost \\x1b]0;pwned")
    assert not OBEYED.search(run.stderr)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "cannot read https://me:pw@h.org/a.mp4?X-Amz-Signature=1f: gone",
            "https://h.org/a.mp4?...: ",
        ),
        ("'https://h.org/watch?v=1&token=abc'", "'https://h.org/watch?...'"),
        ("s3://key:secret@bucket/x.", "s3://bucket/x."),
        ("a://b is no URL of ours", "a://b is no URL of ours"),
    ],
)
def test_what_grants_access_is_left_out_of_what_is_printed(text: str, shown: str) -> None:
    assert shown in safe(text)
    assert not re.search("pw|1f|abc|secret", safe(text))


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full (x/y). Free some space"),
        (errno.EROFS, "Read-only file system (x/y)"),
        (errno.EIO, "Input/output error (x/y)"),
        (errno.EMFILE, "Too many open files (x/y)"),
    ],
)
def test_an_error_of_the_operating_system_is_one_line(
    number: int, says: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "x/y")

    monkeypatch.setattr("reducio_latents.upkeep.verify.verify", fail)
    result = invoke("verify", store)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {says}")
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "name"),
    [
        *((["verify"], name) for name in ("SIGTERM", "SIGINT", "SIGHUP")),
        *((["convert"], name) for name in ("SIGTERM", "SIGINT")),
        *((["encode-corpus"], name) for name in ("SIGTERM", "SIGINT", "SIGHUP")),
    ],
    ids=str,
)
def test_a_signal_ends_any_command_with_one_line_and_its_number(
    words: list[str], name: str, store: Path, corpus: Path, tmp_path: Path
) -> None:
    number = signal.Signals[name]
    ready = tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time\n"
        "from reducio_latents import cli, corpus, encode, upkeep\n"
        "import reducio_latents.upkeep.convert, reducio_latents.upkeep.verify\n"
        "import reducio_latents.encode.run, reducio_latents.corpus.listing\n"
        "import reducio_latents.encode.job\n"
        "def wait(*args, **more):\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        "    time.sleep(600)\n"
        "upkeep.verify.verify = upkeep.convert.convert_store = wait\n"
        "encode.job.make_plan = wait\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments: dict[str, list[str | Path]] = {
        "verify": [store],
        "convert": [store, tmp_path / "c"],
        "encode-corpus": [corpus, tmp_path / "e", *FAST],
    }
    process = Python(["-c", code, *words, *arguments[words[0]]])
    while not ready.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, shown = process.communicate()
    assert process.returncode == 128 + number, shown
    assert f"stopped by {name}" in shown
    assert "Traceback" not in shown


def test_a_terminal_that_closes_ends_a_command_with_its_number() -> None:
    code = (
        "import os, pty, signal\n"
        "import click\n"
        "from reducio_latents.cli.show import one_line\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "pid, terminal = pty.fork()\n"
        "if pid == 0:\n"
        "    with one_line():\n"
        "        try:\n"
        "            click.echo('ready')\n"
        "            signal.pause()\n"
        "        finally:\n"
        "            click.echo('what is still said')\n"
        "os.read(terminal, 1)\n"
        "os.close(terminal)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    printed, errors = Python(["-c", code]).communicate()
    assert printed.strip() == str(128 + signal.SIGHUP), errors


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--gpus", "'many' is not a whole number, nor all."),
        ("--batch-size", "'many' is not a whole number, nor auto."),
        ("--dtype", "'many' is not one of "),
    ],
)
def test_all_that_an_option_may_be_is_named(option: str, says: str) -> None:
    ran = CliRunner().invoke(main, ["encode-corpus", "a", "b", option, "many"])
    assert ran.exit_code == 2
    assert says in ran.output
