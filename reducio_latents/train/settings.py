"""Reading a run's settings: a YAML file or a preset of the package, then `--set` overrides."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from reducio_latents.core.config import from_mapping
from reducio_latents.core.libraries import import_library
from reducio_latents.core.regular import read_small
from reducio_latents.errors import ConfigError
from reducio_latents.train.config import TrainConfig, flat

SETTINGS = "settings.yaml"
"""Where a run keeps its settings."""
FIXED = (
    "model",
    "data.corpus",
    "data.validation_corpus",
    "data.validation_share",
    "data.clip",
    "data.size_px",
    "data.crop",
    "train.batch_size",
    "train.seed",
    "adversarial.discriminators",
)
"""Settings that a run cannot change when it resumes: what is trained, and the order of clips."""


def presets() -> dict[str, str]:
    """Return the YAML of each preset that the package has, by name."""
    folder = files("reducio_latents.train") / "configs"
    found = (path for path in folder.iterdir() if path.name.endswith(".yaml"))
    return {path.name.removesuffix(".yaml"): path.read_text("utf-8") for path in found}


def read_settings(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the settings of a YAML file, or of the preset of that name, with overrides applied.

    `configs/NAME.yaml` names a preset too if there is no such file. An override is
    `section.key=value`, its value written as in YAML. Raises ConfigError, naming file and key.
    """
    raw = parse_yaml(_text(name), where=name)
    for override in overrides:
        _apply(raw, override)
    return from_mapping(TrainConfig, raw, where=name)


def to_yaml(config: TrainConfig) -> str:
    """Return the settings, all of them, as YAML that `read_settings` reads back."""
    import yaml

    text: str = yaml.safe_dump(_plain(config), sort_keys=False)
    return text


def parse_yaml(text: str, *, where: str, hint: str = "") -> dict[str, Any]:
    """Read a YAML mapping; refuse a key that is given twice. `hint` ends what is said of no YAML.

    1e-5 is a number and `off` a word, as in YAML 1.2.
    """
    yaml = import_library("yaml", "reading a config", extra="train")

    class Loader(yaml.SafeLoader):  # type: ignore[misc,name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    line = node.start_mark.line + 1
                    raise ConfigError(f"{where}: {key!r} is given twice below line {line}.")
            return dict(super().construct_mapping(node, deep))

    # YAML 1.1, which PyYAML speaks, wants 1.0e-5, and reads on, off, yes and no as booleans.
    boolean = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] != boolean]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(boolean, re.compile("true|True|false|False"), list("tTfF"))
    number = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        raw = yaml.load(text, Loader)
    except yaml.YAMLError as err:
        mark, problem = getattr(err, "problem_mark", None), getattr(err, "problem", None)
        line = f"line {mark.line + 1}: " if mark and "\n" in text else ""
        why = problem or " ".join(str(err).split())
        raise ConfigError(f"{where} is not YAML: {line}{why}.{hint}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must hold sections, as `train:`, got {type(raw).__name__}.")
    return raw


def _text(name: str) -> str:
    path = Path(name)
    if path.is_file():
        try:
            return read_small(path).decode("utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"{name} cannot be read as text: {err}.") from err
    known = presets()
    stem = path.stem if path.suffix == ".yaml" and path.parent.name in ("", "configs") else name
    if stem in known:
        return known[stem]
    close = get_close_matches(stem, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"presets: {', '.join(sorted(known))}."
    raise ConfigError(f"{name} is no file and no preset; {hint}")


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in nested mappings; from_mapping will judge the names."""
    path, equals, text = override.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not all([*sections, key]):
        raise ConfigError(f"--set {override}: write section.key=value, as train.lr=1e-5.")
    place = raw
    for section in sections:
        inner = place.get(section)
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section.")
        place = inner
    hint = f""" Put the value in quotes of its own: --set '{path}="{text}"'."""
    value = parse_yaml(f"value: {text}", where=f"--set {override}", hint=hint)["value"]
    if isinstance(value, str) and re.fullmatch(re.escape(value) + r"\s+#.*", text.strip()):
        raise ConfigError(f"--set {override}: what follows # is a comment in YAML.{hint}")
    place[key] = value


def _plain(config: TrainConfig) -> Any:
    return json.loads(json.dumps(asdict(config)))  # YAML knows no tuples


def changed_settings(out: Path, config: TrainConfig) -> list[str]:
    """Return, in words, what differs from the run in `out` among the settings that must stay."""
    path = out / SETTINGS
    if not path.exists():
        return []
    was, now = flat(parse_yaml(_text(str(path)), where=str(path))), flat(_plain(config))
    return [
        f"{name} is {now.get(name)}, was {was.get(name)}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and name.startswith(FIXED)
    ]
