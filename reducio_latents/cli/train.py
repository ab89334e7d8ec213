"""`reducio-latents train`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.core import ParameterSource
from tqdm import tqdm


@click.command()
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
@click.option(
    "--pretrained",
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="Weights to start from: published ones, or a checkpoint of another run.",
)
@click.option(
    "--lpips-weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="VGG16's state dict, if torch.hub has none. With loss.perceptual=none: for validation.",
)
@click.option(
    "-k", "--wandb-key", envvar="WANDB_API_KEY", metavar="KEY", help="For log.wandb=online."
)
@click.option("--eval-only", is_flag=True, help="Validate, print the scores, and stop.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the settings and stop.")
def train(
    config: str,
    overrides: tuple[str, ...],
    out: Path | None,
    pretrained: Path | None,
    lpips_weights: Path | None,
    wandb_key: str | None,
    eval_only: bool,
    dry_run: bool,
) -> None:
    """Train Reducio-VAE as CONFIG says: a YAML file, or the name of one of the package's, which
    are reducio_ft4_fs32, reducio_ft2_fs32, reducio_ft4_fs32_1024 and reducio_tiny_ft4_fs32.

    To resume, run the same command again. Several GPUs: under torchrun.

    \b
    reducio-latents train reducio_ft4_fs32 --set data.corpus=videos/ --out runs/ft4
    torchrun --nproc_per_node=8 -m reducio_latents train reducio_ft4_fs32 --set ... --out ...
    """
    from reducio_latents.train.loop import RunOptions
    from reducio_latents.train.loop import train as run
    from reducio_latents.train.settings import read_settings, to_yaml

    settings = read_settings(config, overrides)
    given = click.get_current_context().get_parameter_source("wandb_key")
    if given is ParameterSource.COMMANDLINE and settings.log.wandb == "off":
        raise click.UsageError("-k is for wandb, which is off. Add --set log.wandb=online.")
    if wandb_key:  # wandb keeps the command line, and shows it
        sys.argv = [word.replace(wandb_key, "***") for word in sys.argv]
    out = out if out is not None else Path("runs") / Path(config).stem
    if dry_run:
        click.echo(to_yaml(settings), nl=False)
        return
    options = RunOptions(
        pretrained=pretrained,
        lpips_weights=lpips_weights,
        wandb_key=wandb_key,
        eval_only=eval_only,
        tell=tqdm.write,  # past the bar
        bar=True,
    )
    run(settings, out, options)
