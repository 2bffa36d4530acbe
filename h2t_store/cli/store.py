"""The command ``h2t``: look into a store, check it, repair it, export from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from h2t_store.cli.flags import EXIT_CODES, WORKERS, Json, Name, Store, Version
from h2t_store.cli.reporting import facts, json_text, progress, short, table
from h2t_store.cli.running import interruption
from h2t_store.errors import DamagedError, H2TError, StoreError

if TYPE_CHECKING:
    from h2t_store.storage.store import Extraction, FeatureStore

__all__ = ["app"]

app = typer.Typer(
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look into a feature store, check it, repair it, export from it.",
    epilog=EXIT_CODES,
)


@app.callback()
def _h2t(_: Version = False) -> None:
    pass


@app.command()
def ls(store: Store, as_json: Json = False) -> None:
    """List the extractions of a store, with networks and digests of their weights.

    Example: h2t ls pets.zarr
    """
    opened = _open(store)
    found: dict[str, dict[str, Any]] = {}
    for name in opened.names():
        try:
            found[name] = _summary(opened.open(name))
        except StoreError as error:
            found[name] = {"state": f"damaged: {error}"}
    if as_json:
        print(json_text([{"name": name} | summary for name, summary in found.items()]))
        return
    columns = ("images", "classes", "features", "layers", "stored", "model", "state")
    rows = [(name, *(_shown(summary).get(column, "") for column in columns)) for name, summary in found.items()]
    table(("name", *columns), rows)


@app.command()
def info(store: Store, name: Name, as_json: Json = False) -> None:
    """Print one extraction: layers and their sizes, classes, skipped images, and how it was made.

    Example: h2t info pets.zarr pets/train
    """
    extraction = _open(store).open(name)
    header, failures, summary = extraction.header, extraction.skipped(), _summary(extraction)
    if as_json:
        layers = [
            {"layer": layer.name, "activation": layer.shape, "start": layer.start, "stop": layer.stop}
            | {"target_sizes": layer.target_sizes}
            for layer in header.layers
        ]
        found = {"name": name} | summary | {"dtype": header.dtype, "class_names": header.classes}
        print(json_text(found | extraction.provenance | {"failures": failures, "layer_list": layers}))
        return
    inputs, environment = extraction.provenance["inputs"], extraction.provenance["environment"]
    shown = {"name": name} | _shown(summary) | {"classes": list(header.classes) or "unlabelled"}
    facts(shown | inputs | environment)
    for sample, reason in failures:
        print(f"skipped {sample}: {reason}")
    print()
    rows = [(layer.name, short(layer.shape), f"{layer.start}:{layer.stop}", layer.width) for layer in header.layers]
    table(("layer", "activation", "columns", "width"), rows)


@app.command()
def verify(
    store: Store,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One extraction; by default all.")] = None,
    as_json: Json = False,
) -> None:
    """Read everything and name each damaged or missing chunk and any changed metadata; exit status 3 if any.

    Example: h2t verify pets.zarr
    """
    from h2t_store.storage.store import FeatureStore
    from h2t_store.storage.verify import verify as damages_of

    opened = FeatureStore.unchecked(store)
    with progress("row blocks") as meter:
        found = {each: list(damages_of(opened, each, meter)) for each in (opened.names() if name is None else [name])}
    if as_json:
        print(json_text({each: [damage._asdict() for damage in damages] for each, damages in found.items()}))
    else:
        for each, damages in found.items():
            for damage in damages:
                print(f"{damage.path}: {damage.problem}")
            print(f"{each}: {f'{len(damages)} things are damaged' if damages else _soundness(opened.open(each))}")
    if any(found.values()):
        raise typer.Exit(3)


@app.command()
def repair(
    store: Store,
    name: Name,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Where the images are now.", show_default="where they were"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The network, if its name has changed.", show_default="as recorded"),
    ] = None,
    workers: Annotated[int | None, WORKERS] = None,
    as_json: Json = False,
) -> None:
    """Restore metadata from its copies, and compute damaged row blocks again, and only those.

    Images and network must be the same.

    Example: h2t repair pets.zarr pets/train --data /mnt/moved/pets/train
    """
    from h2t_store.repairing import repair as restore

    with interruption.computing() as meter:
        damages = restore(
            store, name, data=data, model=model, workers=workers, stopped=interruption.asked, progress=meter
        )
    n_blocks = len({damage.block for damage in damages if damage.kind == "block"})
    done = f"{len(damages)} things repaired, {n_blocks} row blocks computed again" if damages else "nothing is damaged"
    result = {"damages": [damage._asdict() for damage in damages], "computed": meter.computed}
    print(json_text(result) if as_json else f"{store}: {name}: {done}")


@app.command()
def rm(
    store: Store,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove one extraction, after asking.

    Example: h2t rm pets.zarr pets/train
    """
    opened = _open(store)
    try:
        what = short(_shown(_summary(opened.open(name))))
    except DamagedError:
        what = "damaged"
    if not yes and not typer.confirm(f"Remove {name} ({what}) from {store}?", err=True):
        raise H2TError("nothing was removed")
    with opened.lock(name):
        opened.remove(name)
    print(json_text({"removed": name}) if as_json else f"{store}: {name} removed")


@app.command()
def export(
    store: Store,
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Name that ends in .npy, .parquet or .safetensors.")],
    layers: Annotated[
        str | None,
        typer.Option(metavar="GLOBS", help="Only these layers, joined by commas.", show_default="all"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep copies of what is read from a URL in this folder, and read them next."),
    ] = None,
    as_json: Json = False,
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
    (n_rows, n_columns), n_bytes = matrix.shape, file.stat().st_size
    result = {"file": str(file), "rows": n_rows, "features": n_columns, "bytes": n_bytes}
    print(json_text(result) if as_json else f"{file}: {n_rows} rows x {n_columns} features, {decimal(n_bytes)}")


def _open(store: str) -> "FeatureStore":
    from h2t_store.storage.store import FeatureStore

    return FeatureStore(store)


def _summary(extraction: "Extraction") -> dict[str, Any]:
    header, inputs = extraction.header, extraction.header.provenance["inputs"]
    return {
        "images": header.n_samples,
        "classes": len(header.classes),
        "features": header.n_features,
        "layers": len(header.layers),
        "stored": extraction.stored_bytes(),
        "model": f"{inputs['model']} {inputs['weights_sha256']:.8}",
        "state": _state(extraction),
    }


def _shown(summary: dict[str, Any]) -> dict[str, Any]:
    return summary | {"stored": decimal(summary["stored"])} if "stored" in summary else summary


def _state(extraction: "Extraction") -> str:
    if extraction.complete:
        return f"complete, {extraction.n_failed} skipped" if extraction.n_failed else "complete"
    committed = extraction.committed()
    return f"{int(committed.sum())} of {len(committed)} row blocks"


def _soundness(extraction: "Extraction") -> str:
    return "sound" if extraction.complete else f"sound as far as it is: {_state(extraction)}"
