"""The command ``extract``."""

import os
import sys
import time
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from h2t_store.cli.flags import EXIT_CODES, Json, Version, folders, with_settings
from h2t_store.cli.reporting import facts, json_text, short, table
from h2t_store.cli.running import interruption
from h2t_store.settings import Running, Settings, read_arguments

__all__ = ["app"]

_STORE = (
    "Store to write to, created if missing: a folder, s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH "
    "(credentials from the environment; pip install 'head2toe[s3]')."
)
_NAME = "Name of the extraction, such as pets/train."
_DRY_RUN = "Print taps with shapes and widths, bytes, and the expected time; store nothing."

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(epilog=EXIT_CODES)
@with_settings
def extract(
    *,
    store: Annotated[str, typer.Option(metavar="STORE", help=_STORE, rich_help_panel="Result", autocompletion=folders)],
    name: Annotated[str, typer.Option(metavar="NAME", help=_NAME, rich_help_panel="Result")],
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help=_DRY_RUN, rich_help_panel="Result")] = False,
    as_json: Json = False,
    version: Version = False,
    **arguments: Any,
) -> None:
    """Run a frozen network once over DATA and store the pooled activations of all its layers.

    Nothing is computed twice: a finished extraction is left as it is, and the same command continues an interrupted
    one. A name that was used for something else is an error.

    Examples:

    extract pets/train --model resnet50 --store pets.zarr --name pets/train

    extract train800val200.txt --model vit_base_patch16_224 --taps paper --cls-token keep --store s.zarr --name c/train

    extract pets.tar --model convnext_tiny --target-size 512 --target-size 4096 --dry-run --store s.zarr --name pets

    extract pets/train --model resnet50 --store s3://bucket/pets.zarr --name pets/train --engine ray --workers 8

    torchrun --nproc-per-node 4 -m h2t_store pets/train --model resnet50 --store pets.zarr --name p --engine torchrun
    """
    if arguments["batch_size"].isdecimal():
        arguments["batch_size"] = int(arguments["batch_size"])
    if dry_run:
        _print_plan(name, *read_arguments(arguments), as_json)
        return
    from h2t_store.extracting import extract as run

    start = time.perf_counter()
    interruption.echoed = arguments["engine"] == "torchrun"
    with interruption.computing() as meter:
        matrix = run(**arguments, store=store, name=name, stopped=interruption.asked, progress=meter)
    if interruption.echoed and os.environ["RANK"] != "0":
        return  # one of the processes of torchrun prints
    seconds, failures = time.perf_counter() - start, matrix.failures
    n_images, n_columns, n_layers, n_classes = *matrix.shape, len(matrix.layers), len(matrix.classes)
    if as_json:
        result = {"store": store, "name": name, "images": n_images, "features": n_columns, "classes": n_classes}
        result |= {"layers": n_layers, "computed": meter.computed, "seconds": seconds, "failures": failures}
        print(json_text(result))
        return
    work = f"{meter.computed} computed in {seconds:.1f} s" if meter.computed else "nothing to compute"
    images = f"{n_images} images of {n_classes} classes" if n_classes else f"{n_images} unlabelled images"
    print(f"{store}: {name}: {images} x {n_columns} features from {n_layers} layers ({work})")
    if failures:
        print(f"{len(failures)} images were skipped, such as {': '.join(failures[0])}", file=sys.stderr)


def _print_plan(name: str, settings: Settings, running: Running, as_json: bool) -> None:
    from h2t_store.engines import open_engine
    from h2t_store.engines.local import seconds_per_image
    from h2t_store.engines.preparation import prepare
    from h2t_store.storage.layout import check_name

    check_name(name)
    open_engine(running)
    job = prepare(settings)
    n_images, n_columns, preprocessing = len(job.source), job.layers[-1].stop, job.inputs["preprocessing"]
    n_bytes = sum(map(job.layer_bytes, job.layers))
    seconds = n_images * seconds_per_image(job, running.workers)
    if as_json:
        total = {"images": n_images, "features": n_columns, "bytes": n_bytes, "seconds": seconds}
        layers = [
            {"layer": each.name, "activation": each.shape, "width": each.width, "bytes": job.layer_bytes(each)}
            for each in job.layers
        ]
        print(json_text(total | {"batch_size": job.batch_size, "preprocessing": preprocessing, "layers": layers}))
        return
    rows = [(each.name, short(each.shape), each.width, decimal(job.layer_bytes(each))) for each in job.layers]
    table(("layer", "activation", "width", "stored"), rows)
    print()
    facts(
        {
            "images": n_images,
            "features": f"{n_columns} from {len(rows)} layers, {settings.dtype}",
            "stored": decimal(n_bytes),
            "preprocessing": preprocessing,
            "batch size": job.batch_size,
            "time": f"{timedelta(seconds=round(seconds))}, {n_images / seconds:.1f} images/s",
        }
    )
