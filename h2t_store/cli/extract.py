"""The command ``extract``."""

import sys
import time
from typing import Annotated, Any, Literal

import typer

from h2t_store.cli.flags import EXIT_CODES, Json, Version, Workers, folders, with_settings
from h2t_store.cli.reporting import by_shape, duration, facts, json_text, size, table
from h2t_store.cli.running import interruption
from h2t_store.settings import Flag, Settings

__all__ = ["app"]

_STORE = (
    "Store to write to, created if missing: a folder, s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH "
    "(credentials from the environment; pip install 'head2toe[s3]')."
)
_DRY_RUN = "Print taps with shapes and widths, bytes, and the expected time; store nothing."
_ON_ERROR = "At an image that cannot be read, stop; or record why, keep its row masked, and continue."
_APPEND = "Extend the extraction by images that are new in DATA, computing only those."
_ENGINE = (
    "Compute in this process, on a Ray cluster (pip install 'head2toe[ray]'), or in processes started by torchrun; one "
    "engine can finish what another began."
)
_RAY_ADDRESS = "Address of a running cluster, 'auto', or 'local' to start one."

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(epilog=EXIT_CODES)
@with_settings
def extract(
    *,
    store: Annotated[str, typer.Option(metavar="STORE", help=_STORE, rich_help_panel="Result", autocompletion=folders)],
    name: Annotated[str, Flag("Name of the extraction, such as pets/train.", "Result", "NAME")],
    dry_run: Annotated[bool, Flag(_DRY_RUN, "Result", names=("--dry-run",))] = False,
    on_error: Annotated[Literal["raise", "skip"], Flag(_ON_ERROR, "Data")] = "raise",
    append: Annotated[bool, Flag(_APPEND, "Data", names=("--append",))] = False,
    workers: Workers = None,
    engine: Annotated[Literal["local", "ray", "torchrun"], Flag(_ENGINE, "Cluster")] = "local",
    ray_address: Annotated[
        str | None, Flag(_RAY_ADDRESS, "Cluster", "ADDRESS", shown="RAY_ADDRESS, else Ray's choice")
    ] = None,
    num_gpus_per_worker: Annotated[
        float | None, Flag("GPUs of each Ray worker, such as 0.5.", "Cluster", "N", shown="1 if the cluster has GPUs")
    ] = None,
    as_json: Json = False,
    version: Version = False,
    **settings: Any,
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
    if settings["batch_size"].isdecimal():
        settings["batch_size"] = int(settings["batch_size"])
    if dry_run:
        from h2t_store.engines import open_engine
        from h2t_store.storage.layout import check_name

        check_name(name)
        open_engine(engine, workers=workers, num_gpus_per_worker=num_gpus_per_worker)
        _print_plan(Settings(**settings), workers, as_json)
        return
    from h2t_store.extracting import extract as run

    start = time.perf_counter()
    interruption.echoed = engine == "torchrun"
    with interruption.computing() as meter:
        matrix = run(
            store=store,
            name=name,
            workers=workers,
            on_error=on_error,
            append=append,
            engine=engine,
            ray_address=ray_address,
            num_gpus_per_worker=num_gpus_per_worker,
            stopped=interruption.asked,
            progress=meter,
            **settings,
        )
    shape = {"images": matrix.shape[0], "features": matrix.shape[1], "classes": len(matrix.classes)}
    done = {"layers": len(matrix.layers), "computed": meter.computed, "seconds": time.perf_counter() - start}
    result: dict[str, Any] = {"store": store, "name": name} | shape | done | {"failures": matrix.failures}
    print(json_text(result) if as_json else _summary(**result))
    if matrix.failures and not as_json:
        sample, reason = matrix.failures[0]
        print(f"{len(matrix.failures)} images were skipped, such as {sample}: {reason}", file=sys.stderr)


def _summary(**of: Any) -> str:
    """The result in one line."""
    work = f"{of['computed']} computed in {of['seconds']:.1f} s" if of["computed"] else "nothing to compute"
    images = (
        f"{of['images']} images of {of['classes']} classes" if of["classes"] else f"{of['images']} unlabelled images"
    )
    return f"{of['store']}: {of['name']}: {images} x {of['features']} features from {of['layers']} layers ({work})"


def _print_plan(settings: Settings, workers: int | None, as_json: bool) -> None:
    from h2t_store.engines.local import seconds_per_image
    from h2t_store.engines.preparation import prepare

    job = prepare(settings)
    n_images, n_columns, preprocessing = len(job.source), job.layers[-1].stop, job.inputs["preprocessing"]
    seconds = n_images * seconds_per_image(job.forward, job.source, job.batch_size, workers)
    if as_json:
        total = {"images": n_images, "features": n_columns, "bytes": job.expected_bytes(), "seconds": seconds}
        layers = [
            {"layer": each.name, "activation": each.shape, "width": each.width, "bytes": job.layer_bytes(each)}
            for each in job.layers
        ]
        found = {"batch_size": job.batch_size, "preprocessing": preprocessing, "layers": layers}
        print(json_text(total | found))
        return
    rows = [(each.name, by_shape(each.shape), each.width, size(job.layer_bytes(each))) for each in job.layers]
    table(("layer", "activation", "width", "stored"), rows)
    print()
    facts(
        {
            "images": n_images,
            "features": f"{n_columns} from {len(rows)} layers, {settings.dtype}",
            "stored": size(job.expected_bytes()),
            "preprocessing": preprocessing,
            "batch size": job.batch_size,
            "time": f"{duration(seconds)}, {n_images / seconds:.1f} images/s",
        }
    )
