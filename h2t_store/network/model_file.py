"""A network that a function in a Python file makes: ``path/to/file.py:factory``."""

import importlib.util
import os
import sys
from pathlib import Path

from torch import nn

from h2t_store.errors import ModelError, did_you_mean, one_line


def build_from_file(spec: str) -> tuple[str, nn.Module, bytes]:
    """Run the file and call its factory; return its name, the network, and the source of the file and its neighbours.

    The file may import modules of its folder, as a script may. They are forgotten afterwards, because they may change,
    and modules in another folder may have the same names.
    """
    path_text, _, factory_name = spec.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise ModelError(f"model {spec!r}: there is no file {path_text!r}")
    module_spec = importlib.util.spec_from_file_location(f"_h2t_model_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ModelError(f"model {spec!r}: {path_text!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    folder, before = str(path.resolve().parent), set(sys.modules)
    sys.modules[module_spec.name] = module
    sys.path.insert(0, folder)
    try:
        module_spec.loader.exec_module(module)
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            callables = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
            suggestion = did_you_mean(factory_name, callables)
            raise ModelError(f"model {spec!r}: {path.name} has no function {factory_name!r}{suggestion}")
        network = factory()
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"model {spec!r}: the file or its factory failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        sys.path.remove(folder)
        neighbours = _take_neighbours(path.resolve(), before)
    if not isinstance(network, nn.Module):
        raise ModelError(f"model {spec!r}: the factory returned {type(network).__name__}, not a torch.nn.Module")
    return f"{path.name}:{factory_name}", network, path.read_bytes() + neighbours


def _take_neighbours(path: Path, before: set[str]) -> bytes:
    """Source of the modules imported from the file's folder, which are forgotten."""
    source = b""
    for name in sorted(set(sys.modules) - before):
        file = Path(getattr(sys.modules[name], "__file__", None) or os.devnull).resolve()
        installed = "site-packages" in file.parts or name.partition(".")[0] == __name__.partition(".")[0]
        if file.is_relative_to(path.parent) and file != path and not installed:
            source += file.read_bytes()
            del sys.modules[name]
    return source
