"""Files of torch.save, read without running anything of them that the user did not allow."""

from __future__ import annotations

import argparse
import importlib
import io
import pickle
import pickletools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ArgumentError, SourceError, UnsafePickleError, reason_of
from ..op_table import ACTIVATION_SPELLINGS, FUNCTION_KINDS
from ..torchvision_shim import torchvision

TRUSTED_PREFIXES = (
    "torch.nn.modules.", "torch.nn.parallel.data_parallel.", "torch.optim.swa_utils.", "torchvision.", "lmh.",
)  # fmt: skip
HOLDERS = (
    "numpy.", "pathlib.", "datetime.", "typing.", "collections.deque", "builtins.frozenset", "builtins.slice",
    "builtins.range", "builtins.object", "builtins.dict", "builtins.list", "builtins.tuple", "builtins.int",
    "builtins.float", "builtins.bool", "builtins.str", "torch.optim.", "torch.torch_version.", "omegaconf.",
    "lightning.", "lightning_fabric.", "lightning_utilities.", "pytorch_lightning.", "torchmetrics.",
    "mmengine.logging.", "mmengine.config.", "mmcv.utils.",
)  # fmt: skip
DICTS = (
    "collections.defaultdict", "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict", "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict", "easydict.EasyDict", "yacs.config.CfgNode",
    "addict.addict.Dict", "munch.Munch", "mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict",
)  # fmt: skip
OWN_CLASS_ADVICE = (
    "When the weights fit no known architecture, save the module itself with torch.save(model, file) and pass --module "
    "my_pkg.my_file, the module that defines its class (or convert it in Python with lmh.convert.convert)."
)
TRUST_ADVICE = (
    "Only if you trust where the file comes from, pass --trust-pickle (trust_pickle=True), which lets it run "
    "code. Better: save the state_dict alone with torch.save(model.state_dict(), file). "
    f"{OWN_CLASS_ADVICE}"
)
_HARMLESS = {"argparse.Namespace": argparse.Namespace}
_PICKLES_OF_A_LEGACY_FILE = 4
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # protocol 2 writes the names of then
_SHOWN = 8


@dataclass(frozen=True)
class Trust:
    """What may be imported and run while a file is read.

    Attributes:
        pickle: whatever the file says.
        modules: dotted names of the user's own modules, whose classes a pickle may name. They are imported, and the
            constructors and ``__setstate__`` of those classes get the values that the pickle gives them.

    Raises:
        ArgumentError: if a name is no module's dotted name, or one of Python's own modules.
    """

    pickle: bool = False
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.modules:
            if not all(part.isidentifier() for part in name.split(".")):
                dotted = name.removesuffix(".py").strip("./").replace("/", ".")
                raise ArgumentError(f"modules: {name!r} is no module's name; expected a dotted one. Pass {dotted}.")
            if name.partition(".")[0] in sys.stdlib_module_names:
                raise ArgumentError(
                    f"modules: {name!r} is a module of Python itself, with which a pickle could run anything; expected "
                    "the module that defines your network. Pass its name."
                )


NO_TRUST = Trust()


class StandIn:
    """Stands where a pickle names something beside the weights: it takes every value and does nothing.

    Attributes:
        name: what the pickle names.
    """

    name = ""

    def __new__(cls, *_arguments: Any, **_options: Any) -> StandIn:
        """Take anything."""
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _DictStandIn(StandIn):
    """Stands for a dict of another type: what comes back holds the same items."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> Any:
        return OrderedDict()


def _empty_list(*_arguments: Any) -> list[Any]:
    """Stand for a list of another type."""
    return []


def read_pickle(path: Path, trust: Trust = NO_TRUST, *, legacy: bool = False) -> Any:
    """Return what a file of torch.save holds, on the CPU.

    Without ``trust.pickle`` only these names mean anything in it: tensors; modules of torch.nn, torchvision and this
    package, and functions of torch.nn.functional; classes that ``trust.modules`` define. Data holders that trainers
    put beside the weights (NumPy numbers, configurations, optimizers) become empty objects. Nothing else is
    imported or run.

    Args:
        path: the file.
        trust: what the user allows besides.
        legacy: whether it has the format before torch 1.6, without a zip archive.

    Raises:
        UnsafePickleError: if it names anything else; with the names.
        SourceError: if it cannot be read.
    """
    if trust.pickle:
        with _current_folder_on_the_path():
            return _load(path, weights_only=False, pickle_module=_renaming(trust.modules))
    names = _legacy_names(path) if legacy else _names(path)
    allowed = {name: _allowed(name, trust.modules) for name in names}
    unknown = sorted(name for name, found in allowed.items() if found is None)
    if unknown and not legacy:
        raise UnsafePickleError(refusal(path, unknown, trust.modules))
    table: list[Any] = [(found, name) for name, found in allowed.items() if found is not None]
    with torch.serialization.safe_globals(table):
        found = _load(path, unknown, weights_only=True)
    hollow = sorted(set(_hollow(found, set(), inside=isinstance(found, StandIn))))
    if hollow:
        raise UnsafePickleError(refusal(path, hollow, trust.modules))
    return found


def _load(path: Path, unknown: Sequence[str] = (), **options: Any) -> Any:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", **options)
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"{path}: its pickle needs a class that cannot be imported ({error}); expected its module on the path. "
            "Set PYTHONPATH to the folder that holds the module; if a script defined the class as it ran, name the "
            "script's module: --module my_script (modules=('my_script',))."
        ) from error
    except pickle.UnpicklingError as error:
        if options["weights_only"] and "weights_only" in str(error).lower():
            raise UnsafePickleError(refusal(path, unknown)) from error
        raise SourceError(_unreadable(path, error)) from error
    except Exception as error:  # torch.load raises almost anything on damaged files
        raise SourceError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = reason_of(error)
    return f"{path}: cannot be read ({reason}); expected a whole file of torch.save. Copy or save it again."


def refusal(path: Path, names: Sequence[str], modules: Sequence[str] = ()) -> str:
    """Say what a pickle names that was not allowed, and what to do about it.

    Args:
        path: the file.
        names: of classes and functions; none if they are not known.
        modules: the user's own, which were allowed.
    """
    if not names:
        return (
            f"{path}: its pickle holds more than tensors, and reading it would run code from the file; expected a "
            f"state_dict. {TRUST_ADVICE}"
        )
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{path}: its pickle names {', '.join(names[:_SHOWN])}{more}; expected tensors and modules of torch.nn or "
        f"torchvision only. {_module_advice(names, modules)}{TRUST_ADVICE}"
    )


def _module_advice(names: Sequence[str], modules: Sequence[str]) -> str:
    homes = dict.fromkeys(name.rpartition(".")[0] for name in names)
    if "__main__" in homes:
        tried = f" None of {', '.join(modules)} defines that class." if modules else ""
        return (
            f"The script that saved it defined the class: name that script's module, --module my_script "
            f"(modules=('my_script',)).{tried} "
        )
    named = [home for home in homes if home in modules]
    if named:
        return (
            f"Of {', '.join(named)} only networks and plain data classes at the top of that file are allowed, not what "
            "it imports. "
        )
    others = sys.stdlib_module_names | {"torch"}
    own = [home for home in homes if home.partition(".")[0] not in others]
    return f"If the class is yours, name its module: {' '.join(f'--module {home}' for home in own)}. " if own else ""


def _names(path: Path) -> list[str]:
    """Return what a pickle names beside tensors; nothing of it is run to find them."""
    try:
        with path.open("rb") as file:
            return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error):
            raise SourceError(_unreadable(path, error)) from error
        raise UnsafePickleError(
            f"{path}: has opcodes that only a full unpickler reads, which would run code from the file; expected one "
            f"that torch.save wrote with its own pickle_protocol. {TRUST_ADVICE}"
        ) from error
    except Exception as error:
        raise SourceError(_unreadable(path, error)) from error


def _legacy_names(path: Path) -> list[str]:
    """Return what the pickles at the head of a legacy file name, tensors' own types included, as far as they go."""
    names: dict[str, None] = {}
    try:
        with path.open("rb") as file:
            for _ in range(_PICKLES_OF_A_LEGACY_FILE):
                names.update(dict.fromkeys(_globals(file)))
    except Exception:
        return list(names)  # a damaged file: torch.load says what is wrong with it
    return list(names)


def _globals(file: BinaryIO | io.BytesIO) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module = _PYTHON_2.get(module, module)
            if module not in ("torch", "torch._utils") and name != "OrderedDict":
                yield f"{module}.{name}"


def _allowed(name: str, modules: Sequence[str]) -> Any | None:
    """Return what a name of a pickle stands for, or None."""
    own = _users_class(name, modules) if modules else None
    return own or _HARMLESS.get(name) or _trusted(name) or _stand_in(name)


def _trusted(name: str) -> Any | None:
    module_name, _, attribute = name.rpartition(".")
    if module_name == "torch.nn.functional":
        function = getattr(F, attribute, None)
        return function if function in FUNCTION_KINDS or function in ACTIVATION_SPELLINGS else None
    if not name.startswith(TRUSTED_PREFIXES) or "__main__" in name:
        return None
    if name.startswith("torchvision."):
        torchvision()
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _stand_in(name: str) -> Any | None:
    if name == "collections.deque":
        return _empty_list
    if name in DICTS:
        return type("StandIn", (_DictStandIn,), {"name": name})
    return type("StandIn", (StandIn,), {"name": name}) if name.startswith(HOLDERS) else None


def _hollow(value: Any, seen: set[int], *, inside: bool = False) -> Iterator[str]:
    """Yield the names of the stand-ins that a module holds, which therefore is not what was saved."""
    if id(value) in seen:
        return
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, StandIn):
        if inside:
            yield kind.name
        return
    if isinstance(value, nn.Module):
        seen.add(id(value))
        for inner in vars(value).values():
            yield from _hollow(inner, seen, inside=True)
    elif isinstance(value, dict | list | tuple | set):
        seen.add(id(value))
        for inner in (*value.values(), *value.keys()) if isinstance(value, dict) else value:
            yield from _hollow(inner, seen, inside=inside)


def _users_class(name: str, modules: Sequence[str]) -> Any | None:
    """Return the class that one of the user's modules defines under this name, or None.

    What those modules only import is not theirs: a class of ``subprocess`` would run anything. ``__main__`` is the
    script that saved the file, under whatever name the user gives it now.
    """
    module_name, _, attribute = name.rpartition(".")
    named = list(modules) if module_name == "__main__" else [module_name] if module_name in modules else []
    homes = [module for module in map(_imported, named) if _defines(module, attribute, modules)]
    return getattr(homes[0], attribute) if len(homes) == 1 else None


def _defines(module: ModuleType, attribute: str, modules: Sequence[str]) -> bool:
    found = vars(module).get(attribute)
    if not isinstance(found, type) or (found.__module__, found.__qualname__) != (module.__name__, attribute):
        return False
    of_data = {"builtins", "enum", "typing", "abc", "dataclasses", *modules}
    return issubclass(found, nn.Module) or all(base.__module__ in of_data for base in found.__mro__)


def _imported(name: str) -> ModuleType:
    try:
        with _current_folder_on_the_path():
            return importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(
            f"--module {name}: cannot be imported ({reason}); expected a module in the current folder or on the path. "
            "Run in the folder that holds it, or set PYTHONPATH."
        ) from error


@contextmanager
def _current_folder_on_the_path() -> Iterator[None]:
    """Find modules in the current folder first, as ``python -m`` does, for as long as a file is read."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _renaming(modules: Sequence[str]) -> Any:
    """Return what torch.load takes for the module pickle, with ``__main__`` found in the user's modules."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module_name: str, name: str) -> Any:
            found = _users_class(f"{module_name}.{name}", modules) if module_name == "__main__" else None
            return found or super().find_class(module_name, name)

    renaming = ModuleType("pickle")
    renaming.__dict__.update(Unpickler=Unpickler, load=pickle.load, loads=pickle.loads)
    return renaming
