"""The commands ``extract`` and ``h2t``: what they accept and what they print, and nothing else."""

import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from h2t_store.errors import H2TError, StoreError

if TYPE_CHECKING:
    from h2t_store.store import Extraction

__all__ = ["extract_main", "h2t_main"]

_PLAIN_SECONDS = 10.0


class _InterruptedError(Exception):
    """A signal stopped the job; typer keeps KeyboardInterrupt to itself."""


_extract_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_h2t_app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help="Look into a feature store."
)


@_extract_app.command()
def _extract(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Folder with one folder of images per class, or 'digits' (scikit-learn's)."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Any timm architecture, h2t_resnet20 (comes along), or path/to/file.py:factory."
        ),
    ],
    store: Annotated[Path, typer.Option(metavar="STORE", help="The store; made where there is none.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="What to call the extraction, such as pets/train.")],
    split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Part of 'digits': train or test.", show_default="train")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option(help="Load published weights, downloaded where need be; else random ones.")
    ] = True,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights to load instead: .safetensors or a torch file of tensors."),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Side of the square input.", show_default="the network's own"),
    ] = None,
    taps: Annotated[
        str,
        typer.Option(
            metavar="TAPS",
            help="Which activations: 'activations' (what enters every convolution and linear layer, block outputs, "
            "logits), 'blocks' (block outputs, penultimate, logits), or globs over module names, joined by commas: "
            "'layer3.*' is outputs, 'layer3.*:in' inputs.",
        ),
    ] = "activations",
    target_size: Annotated[
        int, typer.Option(metavar="N", help="Length that each activation is pooled to, about.")
    ] = 512,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="As stored: float16 or float32.")] = "float16",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", help="Images per forward pass.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-j", metavar="N", help="Processes that decode images.", show_default="up to 4"),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps; auto takes CUDA where it is present.")
    ] = "auto",
    amp: Annotated[bool, typer.Option(help="Run the network in bfloat16 where that is safe.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="For weights that are not loaded (--no-pretrained).")] = 0,
) -> None:
    """Run a frozen network once over DATA and store the pooled activations of all its layers.

    What is stored already is not computed again: a finished extraction is left as it is, an interrupted one is
    continued. An extraction of that name made from something else is an error.

    Example: extract pets/train --model resnet50 --store pets.zarr --name pets/train
    """
    from h2t_store.extraction import extract

    start = time.perf_counter()
    try:
        with _progress() as meter:
            matrix = extract(
                data,
                model=model,
                store=store,
                name=name,
                split=split,
                pretrained=pretrained,
                checkpoint=checkpoint,
                img_size=img_size,
                taps=taps,
                target_size=target_size,
                dtype=dtype,  # type: ignore[arg-type]  # checked by extract, which knows what is accepted
                batch_size=batch_size,
                workers=workers,
                device=device,
                amp=amp,
                seed=seed,
                progress=meter,
            )
    except KeyboardInterrupt:
        raise _InterruptedError from None
    seconds = time.perf_counter() - start
    n_rows, n_columns = matrix.shape
    work = f"{meter.computed} computed in {seconds:.1f} s" if meter.computed else "nothing to compute"
    images = f"{n_rows} images of {len(matrix.classes)} classes" if matrix.classes else f"{n_rows} unlabelled images"
    print(f"{store}: {name}: {images} x {n_columns} features from {len(matrix.layers)} layers ({work})")


@_h2t_app.command()
def ls(store: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")]) -> None:
    """List the extractions in a store, each network with the digest of its weights."""
    from h2t_store.store import FeatureStore

    table = Table(
        "name", "images", "classes", "features", "layers", "stored", "model", "state", box=None, pad_edge=False
    )
    opened = FeatureStore(store)
    for name in opened.names():
        try:
            extraction = opened.open(name)
            table.add_row(*map(escape, _summary(name, extraction)))
        except StoreError as error:
            table.add_row(escape(name), "", "", "", "", "", "", escape(f"damaged: {error}"))
    _console().print(table)


@_h2t_app.command()
def info(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The extraction, as 'h2t ls' names it.")],
) -> None:
    """Print one extraction: its layers with their sizes, its classes, and how it was made."""
    from h2t_store.store import FeatureStore

    extraction = FeatureStore(store).open(name)
    header = extraction.header
    facts = {
        "name": name,
        "images": str(header.n_samples),
        "classes": _short(list(header.classes)) if header.classes else "unlabelled",
        "features": f"{header.n_features} from {len(header.layers)} layers, {header.dtype}",
        "stored": _size(extraction.stored_bytes()),
        "state": _state(extraction),
    }
    for group in ("inputs", "environment"):
        facts |= {key: _short(value) for key, value in header.provenance[group].items() if key not in facts}
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    table = Table("layer", "activation", "columns", "width", box=None, pad_edge=False)
    for layer in header.layers:
        columns = f"{layer.start}:{layer.stop}"
        table.add_row(escape(layer.name), " x ".join(map(str, layer.shape)), columns, str(layer.width))
    print()
    _console().print(table)


@_h2t_app.command()
def rm(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The extraction to remove.")],
) -> None:
    """Remove one extraction and what it stored."""
    from h2t_store.store import FeatureStore

    FeatureStore(store).remove(name)
    print(f"{store}: {name} removed")


def _summary(name: str, extraction: "Extraction") -> tuple[str, ...]:
    header = extraction.header
    return (
        name,
        str(header.n_samples),
        str(len(header.classes)),
        str(header.n_features),
        str(len(header.layers)),
        _size(extraction.stored_bytes()),
        "{model} {weights_sha256:.8}".format(**header.provenance["inputs"]),
        _state(extraction),
    )


def _state(extraction: "Extraction") -> str:
    committed = extraction.committed()
    return "complete" if extraction.complete else f"{int(committed.sum())} of {len(committed)} row blocks"


def extract_main() -> None:
    """Entry point of ``extract``."""
    _run(_extract_app)


def h2t_main() -> None:
    """Entry point of ``h2t``."""
    _run(_h2t_app)


def _run(app: typer.Typer) -> None:
    """Run a command: what a user can cause ends in one line on stderr and a non-zero exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("timm", "huggingface_hub", "httpx", "PIL"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # what a user must know is an error or a logged line
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
    except H2TError as error:
        code = _fail(str(error), 1)
    except _InterruptedError:
        code = _fail("interrupted: finished row blocks are stored, the same command continues", 130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{where}{error.strerror or error}", 1)
    except Exception as error:
        # A usage error; typer has its own class for it or click's, depending on its version.
        if not hasattr(error, "format_message"):
            raise
        # Called without anything, h2t has printed its help already.
        code = _fail(f"{error.format_message()} (see --help)", 2) if error.format_message() else 2
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _console() -> Console:
    """A console that does not break lines where output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=10_000)


class _Meter:
    """Images done, and how fast; the first call says where this run begins."""

    def __init__(self, show: Callable[["_Meter"], None]) -> None:
        self._show = show
        self.total = self.done = self.first = 0
        self.began: float | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.began is None:
            self.began, self.first = time.perf_counter(), done
        self.done, self.total = done, total
        self._show(self)

    @property
    def computed(self) -> int:
        return self.done - self.first

    @property
    def rate(self) -> float:
        """Images per second; 0 until there are some."""
        return self.computed / (time.perf_counter() - self.began) if self.began and self.computed else 0.0


@contextmanager
def _progress() -> Iterator[_Meter]:
    """A bar on a terminal, a plain line now and then elsewhere; both on stderr."""
    if sys.stderr.isatty():
        columns = [
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images, {task.fields[rate]}/s,"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("images", total=None, rate=0)
            yield _Meter(lambda m: bar.update(task, completed=m.done, total=m.total, rate=f"{m.rate:.0f}"))
    else:
        printed = time.perf_counter()

        def line(meter: _Meter) -> None:
            nonlocal printed
            if meter.rate and meter.done < meter.total and time.perf_counter() - printed >= _PLAIN_SECONDS:
                printed = time.perf_counter()
                left = (meter.total - meter.done) / meter.rate
                print(
                    f"{meter.done}/{meter.total} images, {meter.rate:.0f}/s, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

        yield _Meter(line)


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        shown = [str(item) for item in value]
        return ", ".join(shown) if len(shown) <= 6 else f"{', '.join(shown[:3])}, … {shown[-1]} ({len(shown)})"
    return "none" if value is None else str(value)
