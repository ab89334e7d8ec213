"""The state of a dataset as a dict that any checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reducio_latents.dataset.cursor import Position
from reducio_latents.errors import ConfigError

REMEDY = {
    "seed": "Make the dataset with that seed.",
    "global_batch_size": "Choose batch_size so that batch_size times the number of ranks is that.",
    "shuffle": "Make the dataset with that value.",
    "window_shards": "Make the dataset with that value.",
    "drop_last": "Make the dataset with that value.",
    "samples": "The store has grown, or it is another one, or other filters are set.",
    "selection": "It is another store, or other filters or weights are set.",
}
FRESH = (
    "To go on with what is there now, call set_epoch({epoch}) instead: a new epoch in a new order."
)


Identity = Mapping[str, int | str]
"""What the order of batches depends on: the names of `REMEDY` -> an integer, or a hash."""


def write_state(identity: Identity, position: Position) -> dict[str, Any]:
    """Return a position as a dict."""
    state: dict[str, Any] = {"epoch": position.epoch, "batch": position.batch, **identity}
    if position.worker >= 0:  # how a worker's copy is told from the dataset itself
        state |= {"worker": position.worker, "num_workers": position.num_workers}
        state["ended"] = int(position.ended)
    return state


def check_state(identity: Identity, state: Mapping[str, Any]) -> None:
    """Raise ConfigError, saying what differs, unless the state is of this very order."""
    if not isinstance(state, Mapping):
        raise ConfigError(f"a state of a LatentDataset is a dict, got {type(state).__name__}.")
    missing = {"epoch", "batch", *identity} - state.keys()
    if missing:
        raise ConfigError(
            f"this is not a state of a LatentDataset: it lacks {', '.join(sorted(missing))}."
        )
    for name, ours in identity.items():
        if state[name] != ours:
            raise ConfigError(
                f"the state is of another order: {name} is {ours} here, {state[name]} in the "
                f"state. {REMEDY[name]} {FRESH.format(epoch=read_position(state).epoch + 1)}"
            )


def read_position(state: Mapping[str, Any]) -> Position:
    """Return the position of a checked state."""
    defaults = {"worker": -1, "num_workers": 0, "ended": 0}
    try:
        epoch, batch, worker, workers, ended = (
            int(state.get(name, defaults.get(name))) for name in ("epoch", "batch", *defaults)
        )
    except (TypeError, ValueError) as err:
        raise ConfigError(f"the state is damaged ({err}): {dict(state)}.") from err
    if epoch < 0 or batch < 0:
        raise ConfigError(f"the state is damaged: {dict(state)}.")
    return Position(epoch, batch, worker, workers, bool(ended))
