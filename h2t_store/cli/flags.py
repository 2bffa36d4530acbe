"""Arguments that commands share, and the flags of `Settings`."""

import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from glob import glob
from importlib.metadata import version
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args

import typer

from h2t_store.settings import Flag, Settings, flags

__all__ = ["EXIT_CODES", "Json", "Name", "Store", "Version", "Workers", "folders", "with_settings"]

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


def option(kind: Any, flag: Flag) -> Any:
    """A flag as typer declares it."""
    metavar = flag.metavar or ("" if kind is bool else None)
    shown = flag.shown or True
    return typer.Option(*flag.names, metavar=metavar, help=flag.help, show_default=shown, rich_help_panel=flag.panel)


_STORE = "Folder or URL of the store, as for extract."
_WORKERS = Flag(
    "Processes that decode images; with --engine ray, workers that each hold the network.",
    "Speed",
    "N",
    ("--workers", "-j"),
    "up to 4; one per share of GPUs, or per node",
)
Store = Annotated[str, typer.Argument(metavar="STORE", help=_STORE, autocompletion=folders)]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the extraction, as 'h2t ls' prints it.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON, for machines.")]
Workers = Annotated[int | None, option(int, _WORKERS)]
Version = Annotated[
    bool, typer.Option("--version", metavar="", is_eager=True, callback=_print_version, help="Print the version.")
]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add a flag for each field of `Settings` to a command, and turn each `Flag` of its own into an option."""
    known, parameters = flags(), []
    for each in fields(Settings):
        kind, flag = known[each.name]
        info = option(kind, flag) if flag.panel else typer.Argument(metavar=flag.metavar, help=flag.help)
        default = list(each.default) if isinstance(each.default, tuple) else each.default
        default = Parameter.empty if default is MISSING else default
        parameters.append(
            Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])
        )
    for own in signature(command).parameters.values():
        if own.kind is not Parameter.VAR_KEYWORD:
            kind, info = get_args(own.annotation)
            info = option(kind, info) if isinstance(info, Flag) else info
            parameters.append(own.replace(annotation=Annotated[kind, info]))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command
