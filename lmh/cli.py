"""The command ``lmh``: its sub-commands are imported only when they are called."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from . import __version__
from .errors import LMHError
from .pages import keep_freed_memory
from .verbosity import Verbosity, set_verbosity, verbosity

COMMANDS = {
    "convert": ("lmh.convert.cli", "convert_command", "Convert a model to a spiking network (lmh-convert)."),
    "export": ("lmh.convert.export_cli", "export_command", "Write a saved network as ONNX, torch.export or NIR."),
    "finetune": ("lmh.finetune.cli", "finetune_command", "Train a spiking network, or an ANN to one."),
    "inspect": ("lmh.convert.inspect_cli", "inspect_command", "Say what a saved network or a model file is made of."),
    "report": ("lmh.convert.report_cli", "report_command", "Load a saved network and measure it on data."),
    "zoo": ("lmh.zoo.cli", "zoo_group", "List, show and train the zoo's networks."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports them on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup)
@click.version_option(__version__, prog_name="lmh")
def lmh() -> None:
    """Convert pretrained networks to spiking networks of LM-H neurons."""


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for a failed job, 2 for bad usage.

    With ``--json`` among the arguments an error is printed as ``{"error": …}`` on standard output.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    set_verbosity(Verbosity.NORMAL)
    try:
        result: Any = command.main(arguments, prog_name=command.name, standalone_mode=False)
    except click.UsageError as error:
        _say(arguments, error.format_message(), error)
        return 2
    except (LMHError, click.ClickException) as error:
        _say(arguments, error.format_message() if isinstance(error, click.ClickException) else str(error), None)
        return 1
    except (KeyboardInterrupt, click.Abort):
        _say(arguments, "interrupted", None)
        return 130
    return result if isinstance(result, int) else 0


def command_line() -> str:
    """Return the running command as a user can type it again, for a file's record."""
    root = click.get_current_context().find_root()
    name = "lmh" if isinstance(root.command, click.Group) else root.command.name or "lmh"
    return shlex.join([name, *sys.argv[1:]])


def _say(arguments: list[str], message: str, usage: click.UsageError | None) -> None:
    if verbosity() is Verbosity.VERBOSE:
        traceback.print_exc()
    if "--json" in arguments:
        click.echo(json.dumps({"error": message}))
    elif usage is not None:
        usage.show()
    else:
        click.echo(f"Error: {message}", err=True)


def main() -> None:
    """Entry point of ``lmh`` and ``python -m lmh``."""
    sys.exit(run(lmh))
