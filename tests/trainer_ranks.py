"""Trainers on a store, each with its own package: two ranks of a group, and one process alone.

`python -m tests.trainer_ranks STORE FOLDER` imports the packages once, forks the three, and writes
what each was given to FOLDER: 0.json, 1.json, alone.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.fabric
import lightning.pytorch
import torch
import torch.distributed as dist
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from reducio_latents.dataset import LatentDataset, LatentLoader
from reducio_latents.errors import ConfigError
from tests.forked import free_port
from tests.latent_stores import numbers_in

RANKS = {"group": 2, "alone": 1}
EPOCHS = 2
STOP = 3
"""Batches after which runs are broken off."""

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
TRAINERS = ("PyTorch", "Accelerate", "Lightning", "Fabric")
"""Whose use the page shows."""

Options = dict[str, Any]
Clips = list[list[int]]
"""Of each batch."""


def clips(batch: dict[str, Any]) -> list[int]:
    return numbers_in(batch["motion"])


def first(batches: list[Any]) -> Any:
    return batches[0]


def opened(store: Path, **options: Any) -> LatentDataset:
    chosen: Options = {"batch_size": 2, "only_tensors": True} | options
    return LatentDataset(store, window_shards=2, latents="moments", **chosen)


def read(loader: Any) -> Options:
    """Read some epochs; return how many batches were promised, and what came."""
    return {"len": len(loader), "epochs": [[clips(b) for b in loader] for _ in range(EPOCHS)]}


def accelerator(**told: Any) -> Accelerator:
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**told))


def prepared(dataset: LatentDataset, told: Options, **loading: Any) -> Any:
    """Let Accelerate prepare a DataLoader."""
    return accelerator(**told).prepare(DataLoader(dataset, **{"batch_size": None} | loading))


ON, OFF = {"dispatch_batches": True}, {"dispatch_batches": False}
TEXT = ("motion", "text")
COLLATED = {"batch_size": 1, "collate_fn": first}
PREPARED: dict[str, tuple[Options, Options, Options]] = {
    "by default": ({}, {}, {}),
    "by default, workers": ({}, {}, {"num_workers": 2}),
    "by default, collated": ({}, {}, COLLATED),
    "by default, cut": ({"split_batches": True}, {}, COLLATED),
    "on": (ON, {}, {}),
    "on, text of one length": (ON, {"columns": TEXT, "text_tokens": 4}, {}),
    "on, text": (ON, {"columns": TEXT}, {}),
    "on, strings": (ON, {"only_tensors": False}, {}),
    "on, incomplete batches": (ON, {"drop_last": False}, {}),
    "on, states": (ON | {"use_stateful_dataloader": True}, {}, {}),
    "on, one rank given": (ON, {"rank": 0, "world_size": 1}, {}),
    "off": (OFF, {}, {}),
    "off, strings and text": (OFF, {"columns": TEXT, "only_tensors": False}, {}),
    "off, incomplete batches": (OFF, {"drop_last": False}, {}),
    "off, workers": (
        OFF | {"even_batches": False}, {}, {"num_workers": 2, "persistent_workers": True},
    ),
    "off, collated": (OFF, {}, COLLATED),
    "off, states": (OFF | {"use_stateful_dataloader": True}, {}, {}),
    "off, one rank given": (OFF, {"rank": 0, "world_size": 1}, {}),
    "off, an axis more": (OFF, {}, {"batch_size": 1}),
}  # fmt: skip
"""By name: what Accelerate is told, the dataset, and the DataLoader."""


def skipping(store: Path, folder: Path) -> list[Clips]:
    """Go on as Accelerate's own examples do: set the epoch, skip what came before, both ways."""
    found = []
    for told in (ON, OFF):
        loader = prepared(opened(store), told)
        loader.set_epoch(1)
        found.append([clips(batch) for batch in skip_first_batches(loader, STOP)])
    return found


def saving(store: Path, folder: Path) -> Clips:
    """Let Accelerate save and load the state of a run in its second epoch."""
    run, again = accelerator(), accelerator()
    loader: Any = run.prepare(LatentLoader(opened(store)))
    list(loader)
    list(islice(loader, STOP))
    run.save_state(str(folder / "accelerate"))
    run.wait_for_everyone()
    resumed: Any = again.prepare(LatentLoader(opened(store)))
    again.load_state(str(folder / "accelerate"))
    return [clips(batch) for _ in range(2) for batch in resumed]


def keeping_states(store: Path, folder: Path) -> list[Clips]:
    """Let StatefulDataLoaders of Accelerate keep the state, in one process; both ways."""
    found = []
    for told in (ON, OFF):
        loader, resumed = (
            prepared(opened(store), told | {"use_stateful_dataloader": True}) for _ in range(2)
        )
        list(loader)
        list(islice(loader, STOP))
        resumed.load_state_dict(loader.state_dict())
        found.append([clips(batch) for _ in range(2) for batch in resumed])
    return found


def loading(store: Path, folder: Path) -> Clips:
    """Load a state into the dataset that a prepared DataLoader reads."""
    dataset, resumed = opened(store), opened(store)
    list(dataset)
    list(islice(dataset, STOP))
    resumed.load_state_dict(dataset.state_dict())
    loader = prepared(resumed, {})
    return [clips(batch) for _ in range(2) for batch in loader]


def reading_ahead(store: Path, folder: Path) -> Any:
    """Ask the dataset for a state that it cannot know."""
    dataset = opened(store)
    for _ in prepared(dataset, OFF):
        dataset.state_dict()


def distributed(store: Path, folder: Path) -> Options:
    """Train by PyTorch alone."""
    model = DistributedDataParallel(nn.Linear(1, 1))
    loader = LatentLoader(opened(store))
    found = read(loader)
    for batch in loader:
        model(batch["motion"].float().mean().view(1, 1)).sum().backward()
    return found | {"gradient": model.module.weight.grad.item()}


def fabric(store: Path, folder: Path) -> list[Options]:
    run = lightning.fabric.Fabric(accelerator="cpu", devices=dist.get_world_size())
    run.launch()
    loaders = [LatentLoader(opened(store)), DataLoader(opened(store), batch_size=None)]
    return [read(loader) for loader in run.setup_dataloaders(*loaders)]


class Module(lightning.pytorch.LightningModule):  # type: ignore[misc]
    """Writes down what it is given, and a checkpoint after so many batches."""

    def __init__(self, stop: int, path: Path) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.stop, self.path = stop, path
        self.trained: Clips = []
        self.validated: Clips = []

    def training_step(self, batch: dict[str, Any], number: int) -> Tensor:
        self.trained.append(clips(batch))
        loss: Tensor = self.layer(batch["motion"].float().mean().view(1, 1)).sum()
        return loss

    def validation_step(self, batch: dict[str, Any], number: int) -> None:
        self.validated.append(clips(batch))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == self.stop:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(store: Path, folder: Path, make: Callable[[LatentDataset], Any] = LatentLoader) -> Options:
    """Train some epochs with Lightning; go on, all made anew, in the middle of the second."""
    datasets = [opened(store) for _ in range(4)]  # no group has begun
    size = {"batch_size": None, "global_batch_size": 2 * RANKS[folder.name]}
    stop = len(opened(store, **size)) + STOP
    whole, resumed = (Module(stop, folder / "lightning.ckpt") for _ in range(2))
    for module, path in ((whole, None), (resumed, whole.path)):
        trainer = lightning.pytorch.Trainer(
            accelerator="cpu", devices=RANKS[folder.name], strategy="ddp",
            max_epochs=EPOCHS, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, make(datasets.pop()), LatentLoader(datasets.pop()), ckpt_path=path)
    return {"trained": whole.trained, "validated": whole.validated, "resumed": resumed.trained}


def by_the_page(name: str, store: Path, folder: Path) -> Clips:
    """Run what a page shows of a trainer, and let it go on."""
    [code] = re.findall(rf"^### {name}\b.*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    given: Clips = []

    def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        given.append(clips(batch))
        loss: Tensor = model(batch["motion"].float().mean().view(1, 1)).sum()
        return loss

    here = Path.cwd()
    os.chdir(folder)
    for resuming in (False, True):
        model = nn.Linear(1, 1)
        names: Options = {"resuming": resuming, "device": "cpu", "model": model}
        names |= {"loss_of": loss_of, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
        names["epochs"] = 1 + (resuming and name == "Lightning")  # its count is of all
        exec(code, globals() | names | {"dataset": opened(store)})
    os.chdir(here)
    return given


def stateful(dataset: LatentDataset) -> Any:
    return StatefulDataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)


def read_prepared(name: str, store: Path, folder: Path) -> Options:
    told, options, loading = PREPARED[name]
    return read(prepared(opened(store, **options), told, **loading))


BOTH: dict[str, Callable[[Path, Path], Any]] = {
    "Lightning": fit,  # first: its Trainer begins the group
    "saving": saving,
    "skipping": skipping,
    "loading": loading,
    "reading ahead": reading_ahead,
}
IN_A_GROUP = BOTH | {name: partial(read_prepared, name) for name in PREPARED}
IN_A_GROUP |= {
    "LatentLoader": lambda store, _: read(accelerator().prepare(LatentLoader(opened(store)))),
    "Fabric": fabric,
    "DDP": distributed,
}
ALONE = BOTH | {
    "by default": partial(read_prepared, "by default"),
    "states": keeping_states,
    "Lightning, StatefulDataLoader": partial(fit, make=stateful),
    **{f"page: {name}": partial(by_the_page, name) for name in TRAINERS},
}


def be(rank: int | None, store: Path, folder: Path, port: int) -> None:
    """Be a rank as Lightning starts it, or alone; write down what each trainer gave."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    folder /= "alone" if rank is None else "group"
    found = {}
    for name, trainer in (ALONE if rank is None else IN_A_GROUP).items():
        if rank is not None:  # Lightning takes some of it away
            os.environ |= where | {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        try:
            found[name] = trainer(store, folder)
        except ConfigError as err:
            found[name] = str(err)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main(store: Path, folder: Path) -> None:
    for name in ("alone", "group"):
        (folder / name).mkdir()
    port = free_port()
    context = multiprocessing.get_context("fork")
    members = [context.Process(target=be, args=(r, store, folder, port)) for r in (0, 1, None)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    sys.exit(max(abs(member.exitcode or 0) for member in members))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
