"""Run a command: signals, errors in one line, exit status."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.markup import escape

from h2t_store.cli.reporting import Meter, progress
from h2t_store.errors import H2TError, StoppedError

__all__ = ["interruption", "run"]

_ECHO_SECONDS = 2.0  # torchrun forwards the Ctrl-C that its processes got from the terminal already
_RESUMABLE = "finished row blocks are stored, the same command continues"


class _StoppedAtOnceError(BaseException):
    """Not KeyboardInterrupt, which typer handles itself, and not an Exception, which libraries may catch."""


class _Interruption:
    """Handler of SIGINT and SIGTERM: the first one stops after the current row block, a second one at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.echoed = False
        self.meter: Meter | None = None
        self._asked_at = 0.0

    def __call__(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.signal and self.echoed and now - self._asked_at < _ECHO_SECONDS:
            return
        before, self.signal, self._asked_at = self.signal, number, now
        if before or self.meter is None or self.meter.began is None:
            raise _StoppedAtOnceError
        os.write(2, b"stopping after the current row block; a second signal stops at once\n")

    def asked(self) -> bool:
        """Whether to stop."""
        return self.signal != 0

    @contextmanager
    def computing(self) -> Iterator[Meter]:
        """Show progress; from the first row block on, a signal waits for the current one."""
        with progress("images") as self.meter:
            yield self.meter


interruption = _Interruption()


def run(app: typer.Typer) -> None:
    """Run a command and exit; an error that a user can cause is one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("timm", "huggingface_hub", "httpx", "PIL"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # what users must know is an error or a logged line
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interruption)
    message, code = "", 0
    try:
        code = _escape_help(typer.main.get_command(app))(standalone_mode=False) or 0
        sys.stdout.flush()
    except StoppedError:
        message, code = f"stopped: {_RESUMABLE}", 128 + interruption.signal
    except _StoppedAtOnceError:
        message, code = f"interrupted{f': {_RESUMABLE}' if interruption.meter else ''}", 128 + interruption.signal
    except H2TError as error:
        message, code = str(error), 1
    except BrokenPipeError:  # h2t ls STORE | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        message, code = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", 1
    except typer.Abort:
        message, code = "nothing was done", 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # as usage errors have, of typer or of click
            raise
        usage = error.format_message()  # empty after h2t without arguments, which prints its help
        message, code = f"{usage} (see --help)" if usage else "", 2
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _escape_help(command: Any) -> Any:
    """Print brackets in help as they are: rich would take ``head2toe[s3]`` for markup."""
    for part in (command, *command.params):
        for name in ("help", "epilog", "show_default"):
            text = getattr(part, name, None)
            if isinstance(text, str):
                setattr(part, name, escape(text))
    for below in getattr(command, "commands", {}).values():
        _escape_help(below)
    return command
