"""Arguments that commands share, and the flags of `Settings` and `Running`."""

import os
from collections.abc import Callable
from glob import glob
from importlib.metadata import version
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args

import typer

from h2t_store.arguments import parameters
from h2t_store.settings import Running, Settings

__all__ = ["EXIT_CODES", "WORKERS", "Json", "Name", "Store", "Version", "folders", "with_settings"]

EXIT_CODES = (
    "Exit status: 0 done; 1 error, told in one line on stderr; 2 wrong usage; 3 damage found (verify); 130 or 143 "
    "stopped by Ctrl-C or SIGTERM after the current row block."
)


def folders(incomplete: str) -> list[str]:
    """Complete the path of a folder."""
    return [path for path in glob(f"{incomplete}*") if os.path.isdir(path)]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"head2toe {version('head2toe')}")
        raise typer.Exit


def _typed(each: Parameter) -> Parameter:
    """A described argument as typer takes it."""
    flag = each.annotation
    metavar = flag.metavar or ("" if flag.kind is bool else None)
    info: Any = typer.Argument(metavar=metavar, help=flag.help)
    if flag.panel:
        info = typer.Option(
            *flag.names, metavar=metavar, help=flag.help, show_default=flag.shown or True, rich_help_panel=flag.panel
        )
    default = list(each.default) if isinstance(each.default, tuple) else each.default
    return each.replace(default=default, annotation=Annotated[flag.kind, info])


_ONLY_IN_PYTHON = ("stopped", "progress")
_FLAGS = [_typed(each) for each in parameters(Settings) + parameters(Running) if each.name not in _ONLY_IN_PYTHON]

Store = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder or URL of the store, as for extract.", autocompletion=folders)
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the extraction, as 'h2t ls' prints it.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON, for machines.")]
Version = Annotated[
    bool, typer.Option("--version", metavar="", is_eager=True, callback=_print_version, help="Print the version.")
]
WORKERS = next(get_args(each.annotation)[1] for each in _FLAGS if each.name == "workers")


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags of `Settings` and `Running` to a command, which gets them as keyword arguments."""
    own = [each for each in signature(command).parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    command.__signature__ = Signature([*_FLAGS, *own])  # type: ignore[attr-defined]
    return command
