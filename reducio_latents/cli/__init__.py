"""The command line: each command declares its options, builds what it needs, calls one function.

Commands load when they are used, and import torch only inside, so `--help` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from reducio_latents.cli.show import one_line
from reducio_latents.version import __version__

COMMANDS = {
    "encode-corpus": "encoding",
    "add-column": "encoding",
    "plan": "encoding",
    "status": "stores",
    "info": "stores",
    "verify": "stores",
    "stats": "stores",
    "decode": "pictures",
    "check": "pictures",
    "evaluate": "pictures",
    "convert": "upkeep",
    "remove": "upkeep",
    "publish": "upkeep",
    "train": "train",
    "import-checkpoint": "upkeep",
    "bench": "encoding",
}
"""Command -> its module in this package."""


class LatentsGroup(click.Group):
    """Loads commands on demand; whatever ends one is shown as one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"{__name__}.{COMMANDS[cmd_name]}")
        found = (value for value in vars(module).values() if isinstance(value, click.Command))
        return next(command for command in found if command.name == cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line():
            return super().invoke(ctx)


@click.group(
    cls=LatentsGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="reducio-latents")
def main() -> None:
    """Turn a video corpus into a latent dataset, stream it, check it.

    \b
    reducio-latents encode-corpus videos/ pexels.latents --model reducio-ft4-fs32 --weights FILE
    reducio-latents verify pexels.latents
    reducio-latents decode pexels.latents --num 8 --out checks/

    Exit codes: 0 done; 1 an error; 2 wrong usage; 3 done, but too many clips failed; 128 + n
    stopped by signal n.
    """
