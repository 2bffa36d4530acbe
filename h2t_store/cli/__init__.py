"""The commands ``extract`` and ``h2t``: what they accept and what they print, and nothing else."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from h2t_store.cli.reporting import Meter, duration, facts, json_text, progress, short, size, table
from h2t_store.errors import DamagedError, H2TError, StoppedError, StoreError

if TYPE_CHECKING:
    from h2t_store.engines.preparation import Job
    from h2t_store.storage.store import Extraction, FeatureStore

__all__ = ["extract_main", "h2t_main"]

_EXIT_CODES = """Exit status: 0 done; 1 error, told in one line on stderr; 2 wrong usage; 3 damage found (verify);
130 or 143 stopped by Ctrl-C or SIGTERM after the row block in hand."""

_ECHO_SECONDS = 2.0  # torchrun passes on the Ctrl-C that its processes had from the terminal already

_extract_app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich")
_h2t_app = typer.Typer(
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look into a feature store, check it, repair it, export from it.",
    epilog=" ".join(_EXIT_CODES.split()),
)


def _folders(incomplete: str) -> list[str]:
    return [path for path in glob(f"{incomplete}*") if os.path.isdir(path)]


_Store = Annotated[
    str,
    typer.Argument(metavar="STORE", help="The store: a folder, or a URL as of extract.", autocompletion=_folders),
]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="The extraction, as 'h2t ls' names it.")]
_Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON, for machines.")]
_Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        metavar="N",
        help="Processes that decode images; with --engine ray, workers that each hold the network.",
        show_default="up to 4; one per share of GPUs, or per node",
        rich_help_panel="Speed",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"head2toe {version('head2toe')}")
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", metavar="", is_eager=True, callback=_print_version, help="Print the version.")
]


@_h2t_app.callback()
def _h2t(_: _Version = False) -> None:
    pass


class _Interruption:
    """SIGINT and SIGTERM: the first asks for an end after the row block in hand, the second one ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.asked_at = 0.0
        self.echoed = False
        self.meter: Meter | None = None

    def __call__(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.signal and self.echoed and now - self.asked_at < _ECHO_SECONDS:
            return
        before, self.signal, self.asked_at = self.signal, number, now
        if before or self.meter is None or self.meter.began is None:
            raise _StoppedAtOnceError
        os.write(2, b"stopping after the row block in hand; once more stops at once\n")

    def asked(self) -> bool:
        """Whether to stop."""
        return self.signal != 0

    @contextmanager
    def computing(self) -> Iterator[Meter]:
        """Progress of row blocks, which a signal lets be finished from the first one on."""
        with progress("images") as self.meter:
            yield self.meter


class _StoppedAtOnceError(BaseException):
    """Not KeyboardInterrupt, which typer keeps to itself, and nothing that a handler of errors would take for one."""


_interruption = _Interruption()


@_extract_app.command(epilog=" ".join(_EXIT_CODES.split()))
def _extract(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder with one folder of images per class, a .tar of such folders, a list file ('path label' per "
            "line), torch/NAME, hfds/NAME, wds/FOLDER, or 'digits' (scikit-learn's).",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Any timm architecture, h2t_resnet20 (comes along), or path/to/file.py:factory.",
            rich_help_panel="Network",
        ),
    ],
    store: Annotated[
        str,
        typer.Option(
            metavar="STORE",
            help="The store, made where there is none: a folder, s3://BUCKET/PATH, gs://BUCKET/PATH or "
            "az://CONTAINER/PATH (credentials from the environment; pip install 'head2toe[s3]').",
            rich_help_panel="Result",
            autocompletion=_folders,
        ),
    ],
    name: Annotated[
        str,
        typer.Option(metavar="NAME", help="What to call the extraction, such as pets/train.", rich_help_panel="Result"),
    ],
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SPLIT",
            help="Part of the data: of a folder or .tar, the folder of that name in it; of wds/, a split in its "
            "_info.json, or shards and their number of samples: 'x-{0000..0001}.tar|2000'.",
            show_default="train; of a folder or .tar, what is there: several must be named",
            rich_help_panel="Data",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where torch/NAME lies, and what the paths in a list file are relative to.",
            show_default="here; the list's own folder",
            rich_help_panel="Data",
        ),
    ] = None,
    download: Annotated[
        bool,
        typer.Option("--dataset-download", metavar="", help="Let torch/NAME be downloaded.", rich_help_panel="Data"),
    ] = False,
    on_error: Annotated[
        Literal["raise", "skip"],
        typer.Option(
            help="At an image that cannot be read, stop; or record why and go on: its row stays, masked.",
            rich_help_panel="Data",
        ),
    ] = "raise",
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            metavar="",
            help="Extend the extraction by images that DATA has got since, computing only those.",
            rich_help_panel="Data",
        ),
    ] = False,
    pretrained: Annotated[
        bool,
        typer.Option(
            metavar="",
            help="Load published weights, downloaded where need be; else random ones.",
            rich_help_panel="Network",
        ),
    ] = True,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights to load instead: .safetensors or a torch file of tensors.",
            rich_help_panel="Network",
        ),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Side of the square input.",
            show_default="the network's own",
            rich_help_panel="Network",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="For weights that are not loaded (--no-pretrained).", rich_help_panel="Network"),
    ] = 0,
    taps: Annotated[
        str,
        typer.Option(
            metavar="TAPS",
            help="Which activations: 'activations' (what enters every convolution and linear layer, block outputs, "
            "logits), 'blocks' (block outputs, penultimate, logits), 'paper' (as published, ResNets and ViTs), or "
            "globs over module names, joined by commas: 'layer3.*' is outputs, 'layer3.*:in' inputs.",
            rich_help_panel="Features",
        ),
    ] = "activations",
    cls_token: Annotated[
        Literal["pool", "only", "keep"],
        typer.Option(
            help="A class token is pooled with the others, taken alone, or kept beside the pooled others.",
            rich_help_panel="Features",
        ),
    ] = "pool",
    target_size: Annotated[
        list[int],
        typer.Option(
            metavar="N",
            help="Length that each activation is pooled to, about; given several times, all are stored in one pass, "
            "side by side (X.select_target_size takes one).",
            rich_help_panel="Features",
        ),
    ] = [512],  # noqa: B006  typer reads it once
    dtype: Annotated[
        Literal["float16", "float32"],
        typer.Option(help="As stored.", rich_help_panel="Features"),
    ] = "float16",
    batch_size: Annotated[
        str,
        typer.Option(
            "--batch-size",
            "-b",
            metavar="N|auto",
            help="Images per forward pass; halved for as long as CUDA runs out of memory.",
            rich_help_panel="Speed",
        ),
    ] = "auto",
    workers: _Workers = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="cpu, cuda, cuda:1, mps; auto takes CUDA where it is present.",
            rich_help_panel="Speed",
        ),
    ] = "auto",
    amp: Annotated[
        bool, typer.Option(metavar="", help="Run the network in bfloat16 where that is safe.", rich_help_panel="Speed")
    ] = False,
    torchcompile: Annotated[
        bool,
        typer.Option(
            "--torchcompile", metavar="", help="Compile the network with the pooling first.", rich_help_panel="Speed"
        ),
    ] = False,
    engine: Annotated[
        Literal["local", "ray", "torchrun"],
        typer.Option(
            help="Compute in this process, on a Ray cluster (pip install 'head2toe[ray]'), or in the processes that "
            "torchrun started; what one engine began another can finish.",
            rich_help_panel="Cluster",
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A running cluster, 'auto', or 'local' to start one.",
            show_default="RAY_ADDRESS, else as Ray decides",
            rich_help_panel="Cluster",
        ),
    ] = None,
    num_gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="GPUs of each Ray worker, such as 0.5.",
            show_default="1 where there are some",
            rich_help_panel="Cluster",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar="",
            help="Print the taps with their shapes and widths, bytes, and the time to expect; store nothing.",
            rich_help_panel="Result",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print JSON, for machines.", rich_help_panel="Result")
    ] = False,
    _: _Version = False,
) -> None:
    """Run a frozen network once over DATA and store the pooled activations of all its layers.

    What is stored already is not computed again: a finished extraction is left as it is, an interrupted one is
    continued by the same command. An extraction of that name made from something else is an error.

    Examples:

    extract pets/train --model resnet50 --store pets.zarr --name pets/train

    extract train800val200.txt --model vit_base_patch16_224 --taps paper --cls-token keep --store s.zarr --name c/train

    extract pets.tar --model convnext_tiny --target-size 512 --target-size 4096 --dry-run --store s.zarr --name pets

    extract pets/train --model resnet50 --store s3://bucket/pets.zarr --name pets/train --engine ray --workers 8

    torchrun --nproc-per-node 4 -m h2t_store pets/train --model resnet50 --store pets.zarr --name p --engine torchrun
    """
    from h2t_store.extracting import check_running, extract

    settings: dict[str, Any] = dict(
        model=model,
        split=split,
        data_dir=data_dir,
        download=download,
        pretrained=pretrained,
        checkpoint=checkpoint,
        img_size=img_size,
        taps=taps,
        cls_token=cls_token,
        target_size=target_size,
        dtype=dtype,
        batch_size=_batch_size(batch_size),
        device=device,
        amp=amp,
        torchcompile=torchcompile,
        seed=seed,
    )
    if dry_run:
        from h2t_store.engines import open_engine
        from h2t_store.engines.preparation import prepare

        check_running(name, workers, on_error)
        open_engine(engine, workers=workers, num_gpus_per_worker=num_gpus_per_worker)
        _print_plan(prepare(data, **settings), workers, as_json)
        return
    start = time.perf_counter()
    _interruption.echoed = engine == "torchrun"
    with _interruption.computing() as meter:
        matrix = extract(
            data,
            store=store,
            name=name,
            workers=workers,
            on_error=on_error,
            append=append,
            engine=engine,
            ray_address=ray_address,
            num_gpus_per_worker=num_gpus_per_worker,
            stopped=_interruption.asked,
            progress=meter,
            **settings,
        )
    seconds = time.perf_counter() - start
    n_rows, n_columns = matrix.shape
    failures = matrix.failures
    if as_json:
        result = {"store": str(store), "name": name, "images": n_rows, "features": n_columns}
        result |= {"classes": len(matrix.classes), "layers": len(matrix.layers), "computed": meter.computed}
        print(json_text(result | {"seconds": seconds, "failures": failures}))
        return
    work = f"{meter.computed} computed in {seconds:.1f} s" if meter.computed else "nothing to compute"
    images = f"{n_rows} images of {len(matrix.classes)} classes" if matrix.classes else f"{n_rows} unlabelled images"
    print(f"{store}: {name}: {images} x {n_columns} features from {len(matrix.layers)} layers ({work})")
    if failures:
        sample, reason = failures[0]
        print(f"{len(failures)} images were skipped, such as {sample}: {reason}", file=sys.stderr)


def _batch_size(given: str) -> Any:
    try:
        return given if given == "auto" else int(given)
    except ValueError:
        raise H2TError(f"--batch-size {given!r}: accepted are whole numbers from 1 and 'auto'") from None


def _print_plan(job: "Job", workers: int | None, as_json: bool) -> None:
    from h2t_store.extracting import expected_seconds

    header = job.header(job.source)
    n_bytes, seconds = job.expected_bytes(), expected_seconds(job, workers)
    layers: list[dict[str, Any]] = [
        {"layer": layer.name, "activation": list(layer.shape), "width": layer.width, "bytes": job.layer_bytes(layer)}
        for layer in header.layers
    ]
    preprocessing = header.provenance["inputs"]["preprocessing"]
    total = {"images": header.n_samples, "features": header.n_features, "bytes": n_bytes, "seconds": seconds}
    if as_json:
        print(json_text(total | {"batch_size": job.batch_size, "preprocessing": preprocessing, "layers": layers}))
        return
    rows = [
        (layer["layer"], " x ".join(map(str, layer["activation"])), layer["width"], size(layer["bytes"]))
        for layer in layers
    ]
    table(("layer", "activation", "width", "stored"), rows)
    print()
    facts(
        {
            "images": header.n_samples,
            "features": f"{header.n_features} from {len(layers)} layers, {header.dtype}",
            "stored": size(n_bytes),
            "preprocessing": preprocessing,
            "batch size": job.batch_size,
            "time": f"{duration(seconds)}, {header.n_samples / seconds:.1f} images/s",
        }
    )


@_h2t_app.command()
def ls(store: _Store, as_json: _Json = False) -> None:
    """List the extractions in a store, each network with the digest of its weights.

    Example: h2t ls pets.zarr
    """
    from h2t_store.storage.store import FeatureStore

    opened = FeatureStore(store)
    rows: list[dict[str, Any]] = []
    for name in opened.names():
        try:
            rows.append({"name": name} | _summary(opened.open(name)))
        except StoreError as error:
            rows.append({"name": name, "state": f"damaged: {error}"})
    if as_json:
        print(json_text(rows))
        return
    columns = ("name", "images", "classes", "features", "layers", "stored", "model", "state")
    shown = [row | {"stored": size(row["stored"])} if "stored" in row else row for row in rows]
    table(columns, [[row.get(column, "") for column in columns] for row in shown])


@_h2t_app.command()
def info(store: _Store, name: _Name, as_json: _Json = False) -> None:
    """Print one extraction: its layers with their sizes, its classes, what was skipped, and how it was made.

    Example: h2t info pets.zarr pets/train
    """
    from h2t_store.storage.store import FeatureStore

    extraction = FeatureStore(store).open(name)
    header = extraction.header
    failures = extraction.skipped()
    layers = [
        {"layer": layer.name, "activation": list(layer.shape), "start": layer.start, "stop": layer.stop}
        | {"target_sizes": list(layer.target_sizes)}
        for layer in header.layers
    ]
    if as_json:
        found = {"name": name} | _summary(extraction) | {"dtype": header.dtype, "class_names": list(header.classes)}
        print(json_text(found | extraction.provenance | {"failures": failures, "layer_list": layers}))
        return
    shown: dict[str, Any] = {
        "name": name,
        "images": header.n_samples,
        "classes": list(header.classes) or "unlabelled",
        "features": f"{header.n_features} from {len(header.layers)} layers, {header.dtype}",
        "stored": size(extraction.stored_bytes()),
        "state": _state(extraction),
    }
    for part in ("inputs", "environment"):
        shown |= {key: value for key, value in extraction.provenance[part].items() if key not in shown}
    facts(shown)
    for sample, reason in failures:
        print(f"skipped {sample}: {reason}")
    print()
    rows = [
        (layer.name, " x ".join(map(str, layer.shape)), f"{layer.start}:{layer.stop}", layer.width)
        for layer in header.layers
    ]
    table(("layer", "activation", "columns", "width"), rows)


@_h2t_app.command()
def verify(
    store: _Store,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One extraction; by default all.")] = None,
    as_json: _Json = False,
) -> None:
    """Read everything and name each damaged or missing chunk and any changed metadata; status 3 if there is any.

    Example: h2t verify pets.zarr
    """
    from h2t_store.storage.store import FeatureStore
    from h2t_store.storage.verify import verify as damages_of

    opened = FeatureStore.unchecked(store)
    names = opened.names() if name is None else [name]
    found: dict[str, list[dict[str, Any]]] = {}
    with progress("row blocks") as meter:
        for each in names:
            found[each] = [damage._asdict() for damage in damages_of(opened, each, meter)]
    n_damaged = len({damage["path"] for damages in found.values() for damage in damages})
    if as_json:
        print(json_text(found))
    else:
        for each, damages in found.items():
            for damage in damages:
                print(f"{damage['path']}: {damage['problem']}")
            print(f"{each}: {f'{len(damages)} things are damaged' if damages else _soundness(opened, each)}")
    if n_damaged:
        raise typer.Exit(3)


def _soundness(store: "FeatureStore", name: str) -> str:
    extraction = store.open(name)
    return "sound" if extraction.complete else f"sound as far as it is: {_state(extraction)}"


@_h2t_app.command()
def repair(
    store: _Store,
    name: _Name,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Where its images are now.", show_default="where they were"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its network, if that goes by another name now.", show_default="as then"),
    ] = None,
    workers: _Workers = None,
    as_json: _Json = False,
) -> None:
    """Restore what is damaged: metadata from its copy, row blocks by computing them again, and only those.

    Images and network must be the same.

    Example: h2t repair pets.zarr pets/train --data /mnt/moved/pets/train
    """
    from h2t_store.repairing import repair as restore

    with _interruption.computing() as meter:
        damages = restore(
            store, name, data=data, model=model, workers=workers, stopped=_interruption.asked, progress=meter
        )
    blocks = sorted({damage.block for damage in damages if damage.kind == "block"})
    if as_json:
        print(json_text({"damages": [damage._asdict() for damage in damages], "computed": meter.computed}))
    elif damages:
        print(f"{store}: {name}: {len(damages)} things repaired, {len(blocks)} row blocks computed again")
    else:
        print(f"{store}: {name}: nothing is damaged")


@_h2t_app.command()
def rm(
    store: _Store,
    name: _Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")] = False,
    as_json: _Json = False,
) -> None:
    """Remove one extraction and what it stored, after asking.

    Example: h2t rm pets.zarr pets/train
    """
    from h2t_store.storage.store import FeatureStore

    opened = FeatureStore(store)
    try:
        summary = _summary(opened.open(name))
        what = short(summary | {"stored": size(summary["stored"])})
    except DamagedError:
        what = "damaged"
    if not yes and not typer.confirm(f"Remove {name} ({what}) from {store}?", err=True):
        raise H2TError("nothing was removed")
    with opened.lock(name):
        opened.remove(name)
    print(json_text({"removed": name}) if as_json else f"{store}: {name} removed")


@_h2t_app.command()
def export(
    store: _Store,
    name: _Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Name that ends in .npy, .parquet or .safetensors.")],
    layers: Annotated[
        str | None,
        typer.Option(metavar="GLOBS", help="Only these layers, joined by commas.", show_default="all"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep copies here of what is read from a URL, and read them the next time."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write features, labels and identifiers to one file, as float32.

    Example: h2t export pets.zarr pets/train pets.parquet --layers 'layer4.*'
    """
    from h2t_store.export import export as write
    from h2t_store.matrix import open_features

    matrix = open_features(store, name, cache=cache)
    if layers is not None:
        matrix = matrix.select_layers(layers.split(","))
    with progress("rows") as meter:
        write(matrix, file, meter)
    n_bytes = file.stat().st_size
    if as_json:
        print(json_text({"file": str(file), "rows": matrix.shape[0], "features": matrix.shape[1], "bytes": n_bytes}))
    else:
        print(f"{file}: {matrix.shape[0]} rows x {matrix.shape[1]} features, {size(n_bytes)}")


def _summary(extraction: "Extraction") -> dict[str, Any]:
    header = extraction.header
    inputs = header.provenance["inputs"]
    return {
        "images": header.n_samples,
        "classes": len(header.classes),
        "features": header.n_features,
        "layers": len(header.layers),
        "stored": extraction.stored_bytes(),
        "model": f"{inputs.get('model')} {inputs.get('weights_sha256')!s:.8}",
        "state": _state(extraction),
    }


def _state(extraction: "Extraction") -> str:
    if extraction.complete:
        return f"complete, {extraction.n_failed} skipped" if extraction.n_failed else "complete"
    committed = extraction.committed()
    return f"{int(committed.sum())} of {len(committed)} row blocks"


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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interruption)
    try:
        code = _with_literal_help(typer.main.get_command(app))(standalone_mode=False)
        sys.stdout.flush()
    except StoppedError:
        code = _fail("stopped: finished row blocks are stored, the same command continues", 128 + _interruption.signal)
    except _StoppedAtOnceError:
        resumable = ": finished row blocks are stored, the same command continues" if _interruption.meter else ""
        code = _fail(f"interrupted{resumable}", 128 + _interruption.signal)
    except H2TError as error:
        code = _fail(str(error), 1)
    except BrokenPipeError:  # as in: h2t ls STORE | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{where}{error.strerror or error}", 1)
    except typer.Abort:
        code = _fail("nothing was done", 1)
    except Exception as error:
        # A usage error; typer has its own class for it or click's, depending on its version.
        if not hasattr(error, "format_message"):
            raise
        # Called without anything, h2t has printed its help already.
        code = _fail(f"{error.format_message()} (see --help)", 2) if error.format_message() else 2
    sys.exit(code if isinstance(code, int) else 0)


def _with_literal_help(command: Any) -> Any:
    """The same command with brackets in its help that are printed: rich would take ``head2toe[s3]`` for markup."""
    for part in (command, *command.params):
        for name in ("help", "epilog", "show_default"):
            text = getattr(part, name, None)
            if isinstance(text, str):
                setattr(part, name, escape(text))
    for below in getattr(command, "commands", {}).values():
        _with_literal_help(below)
    return command


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
