"""The commands ``extract`` and ``h2t``: parsing and printing only."""

from h2t_store.cli import extract, store
from h2t_store.cli.running import run

__all__ = ["extract_main", "h2t_main"]


def extract_main() -> None:
    """Entry point of ``extract``."""
    run(extract.app)


def h2t_main() -> None:
    """Entry point of ``h2t``."""
    run(store.app)
