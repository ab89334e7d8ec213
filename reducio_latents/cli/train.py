"""`reducio-latents train`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from reducio_latents.cli.options import command, dry_run, takes
from reducio_latents.cli.show import safe
from reducio_latents.train.options import RunOptions


@command("train")
@click.argument("config")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Change a setting, as train.lr=1e-5; may be repeated.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="The run.  [runs/CONFIG's name]"
)
@takes(RunOptions, {"Options": "pretrained lpips_weights eval_only"})
@click.option(
    "-k", "--wandb-key", envvar="WANDB_API_KEY", metavar="KEY", help="For log.wandb=online."
)
@dry_run
def train(
    config: str,
    overrides: tuple[str, ...],
    out: Path | None,
    options: RunOptions,
    wandb_key: str | None,
    dry_run: bool,
) -> None:
    """Train Reducio-VAE as CONFIG says: a YAML file, or the name of one of the package's, which
    are reducio_ft4_fs32, reducio_ft2_fs32, reducio_ft4_fs32_1024 and reducio_tiny_ft4_fs32.

    To resume, run the same command again. Several GPUs: under torchrun.

    \b
    reducio-latents train reducio_ft4_fs32 --set data.corpus=videos/ --out runs/ft4
    torchrun --nproc_per_node=8 -m reducio_latents train reducio_ft4_fs32 --set ... --out ...
    """
    from tqdm import tqdm

    from reducio_latents.train.loop import train as run
    from reducio_latents.train.settings import read_settings, to_yaml

    settings = read_settings(config, overrides)
    given = click.get_current_context().get_parameter_source("wandb_key")
    if given is ParameterSource.COMMANDLINE and settings.log.wandb == "off":
        raise click.UsageError("-k is for wandb, which is off. Add --set log.wandb=online.")
    if wandb_key:  # wandb keeps the command line, and shows it
        sys.argv = [word.replace(wandb_key, "***") for word in sys.argv]
    if dry_run:
        click.echo(to_yaml(settings), nl=False)
        return

    def tell(line: str) -> None:
        tqdm.write(safe(line))  # past the bar

    out = out if out is not None else Path("runs") / Path(config).stem
    run(settings, out, replace(options, wandb_key=wandb_key, tell=tell, bar=True))
