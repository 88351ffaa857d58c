"""
Code of other libraries that this project relies on, found in the code of the package.

- What it imports: functions, and of classes the members that its code names.
- What it overrides: methods of the classes above its own.
- Private names that it reads: the members of these classes that define or assign them, and where none does, any code.
- The cache of recurrent layers, and those layers, wherever they call one.

Names are those of the places where they are defined. A short list, `ASSUMED`, holds what the package's code does not
show.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from .sources import Files, assigned, installed


ROOT = Path(__file__).parents[1]
PACKAGES = ("accelerate", "deepspeed", "transformers", "trl")
PATHS = sorted(path for path in (ROOT / "trl_singlepass").rglob("*.py") if path.name != "__main__.py")
NODES = [node for path in PATHS for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]

# The class in whose copies recurrent layers keep their states on trees, with the methods that a release adds.
CACHE = "transformers.cache_utils.Cache"

# Code that the package is written for, but that its code does not name.
ASSUMED = [
    # Ulysses: which groups share rows, where attention is taken over, and why accelerate refuses recurrent layers.
    "accelerate.big_modeling._refuse_recurrent_layers_under_sequence_parallelism",
    "deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF",
    "deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPDataLoaderAdapter",
    # ZeRO-3: when a leaf is gathered, and when its gradients are reduced.
    "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module",
    "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator.fetch_sub_module",
    "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator.reset_step",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks",
    # The fused head, whose outputs weights and waves read.
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction",
    "trl.trainer.utils.add_fused_lm_head",
    # The order in which a checkpoint is written, and how a layer runs again.
    "transformers.trainer.Trainer._save_checkpoint",
    "transformers.modeling_layers.GradientCheckpointingLayer",
]


def relied_on(package: str, files: Files) -> list[str]:
    """Return the names of all code of a package, whose files are given, that this project relies on."""
    names = [*imported(), *overridden(), *members(), *private(), *ASSUMED, *of_cache()]
    own = [name for name in names if name.split(".")[0] == package]
    return list(dict.fromkeys([*own, *callers_of_caches(files)])) if package == "transformers" else own


@cache
def imported() -> tuple[str, ...]:
    """Return the names of the functions that the package imports, where they are defined."""
    return tuple(_name(item) for item in _imports() if inspect.isfunction(item))


@cache
def foreign_classes() -> tuple[type, ...]:
    """Return the classes that the package imports, and those above them, of the same libraries."""
    classes = [above for item in _imports() if inspect.isclass(item) for above in item.__mro__]
    return tuple(dict.fromkeys(one for one in classes if one.__module__.split(".")[0] in PACKAGES))


def _imports() -> Iterator[object]:
    for node in NODES:
        if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] in PACKAGES:
            module = importlib.import_module(str(node.module))
            yield from (getattr(module, alias.name, None) for alias in node.names)


def _name(item: type | object) -> str:
    return f"{item.__module__}.{item.__qualname__}"  # type: ignore[attr-defined]


# Classes -------------------------------------------------------------------------------------------------------------


def own_classes() -> Iterator[tuple[type, list[type]]]:
    """Yield the classes of the package that derive from foreign ones, with those."""
    for path in PATHS:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for item in vars(module).values():
            if inspect.isclass(item) and item.__module__ == module.__name__:
                above = [one for one in item.__mro__ if one.__module__.split(".")[0] in PACKAGES]
                if above:
                    yield item, above


@cache
def overridden() -> tuple[str, ...]:
    """Return the names of the foreign methods that classes of the package override, in every class that has them."""
    return tuple(
        f"{_name(base)}.{name}"
        for own, above in own_classes()
        for name in {name for one in own.__mro__ if one.__module__.startswith("trl_singlepass") for name in vars(one)}
        for base in above
        if inspect.isroutine(vars(base).get(name))
    )


def signature_gaps() -> list[str]:
    """Return the parameters of foreign methods that the package's methods in their place do not take."""
    classes = dict(own_classes())
    last = [own for own in classes if not any(own in other.__mro__[1:] for other in classes)]  # no mixins
    return [gap for own in last for gap in gaps_between(own, classes[own])]


def gaps_between(own: type, above: Sequence[type]) -> Iterator[str]:
    """Yield the parameters of the methods of classes, from the nearest, that those in their place do not take."""
    between = [vars(one) for one in own.__mro__ if one not in above]
    for name in dict.fromkeys(name for members in between for name in members if not name.startswith("__")):
        method = next(members[name] for members in between if name in members)
        foreign = next((vars(one)[name] for one in above if name in vars(one)), None)
        if inspect.isfunction(method) and inspect.isfunction(foreign):
            taken = inspect.signature(method).parameters
            kinds, given = {one.kind for one in taken.values()}, inspect.signature(foreign).parameters.values()
            is_any = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL} & kinds
            named = [one.name for one in given if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
            yield from (f"{_name(own)}.{name} does not take {one}" for one in named if not is_any and one not in taken)


@cache
def members() -> tuple[str, ...]:
    """Return the names of the functions and properties of foreign classes that the package's code names."""
    named = read_names()
    return tuple(
        f"{_name(one)}.{name}"
        for one in foreign_classes()
        for name, value in vars(one).items()
        if name in named and (inspect.isroutine(value) or isinstance(value, property))
    )


@cache
def read_names() -> frozenset[str]:
    """Return every name that the package reads of an object, as an attribute or by `getattr`."""
    names = {node.attr for node in NODES if isinstance(node, ast.Attribute)}
    by_text = ("getattr", "hasattr", "setattr")
    for node in NODES:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in by_text:
            names |= {
                part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
    return frozenset(names)


# Private names -------------------------------------------------------------------------------------------------------


def private_names() -> set[str]:
    """Return the private names that the package reads or imports, but does not define."""
    imports = {
        alias.name for node in NODES if isinstance(node, ast.ImportFrom) and not node.level for alias in node.names
    }
    own = {node.name for node in NODES if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = [node for node in NODES if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store)]
    own |= {node.id if isinstance(node, ast.Name) else node.attr for node in stored}
    on_others = {node.attr for node in stored if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self"}
    own -= {name for name in on_others if _places_near(name)}  # of a class of theirs, and set by the package
    return {name for name in {*read_names(), *imports} - own if name.startswith("_") and not name.startswith("__")}


@cache
def private() -> tuple[str, ...]:
    """Return the code that gives private names their meaning."""
    return tuple(place for name in sorted(private_names()) for place in places_of(name))


@cache
def places_of(name: str) -> tuple[str, ...]:
    """Return the code that defines a name or assigns it to an object, that of foreign classes if there is any."""
    if near := _places_near(name):
        return near
    paths = (path for package in PACKAGES for path in installed(package)[1].paths if path.endswith(".py"))
    return tuple(place for path in paths if "/models/" not in path for place in _places_in(path, name))


@cache
def _places_near(name: str) -> tuple[str, ...]:
    modules = dict.fromkeys(one.__module__ for one in foreign_classes())
    return tuple(place for module in modules for place in _places_in(_path(module), name))


def _path(module: str) -> str:
    return str(inspect.getsourcefile(importlib.import_module(module))).rpartition("site-packages/")[2]


def _places_in(path: str, name: str) -> list[str]:
    source = installed(path.split("/")[0])[1](path) or ""
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return [f"{module}.{place}" for place in _places_by_name(source).get(name, ())] if name in source else []


@cache
def _places_by_name(source: str) -> dict[str, list[str]]:
    """Return, for each private name, its definitions and the functions that assign it."""
    found: dict[str, list[str]] = {}
    for name, place in _defining(ast.parse(source)):
        if name.startswith("_") and not name.startswith("__"):
            found.setdefault(name, []).append(place)
    return found


def _defining(tree: ast.AST, within: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            place = ".".join((*within, node.name))
            yield node.name, place
            if isinstance(node, ast.ClassDef):
                yield from _defining(node, (*within, node.name))
            else:
                stored = (part for part in ast.walk(node) if isinstance(getattr(part, "ctx", None), ast.Store))
                names = (getattr(part, "id", getattr(part, "attr", None)) for part in stored)
                yield from ((str(name), place) for name in dict.fromkeys(names) if name != node.name)
        elif isinstance(node, ast.If | ast.Try):
            yield from _defining(node, within)
        else:
            yield from ((name, ".".join((*within, name))) for name in assigned(node))


# The cache of recurrent layers ---------------------------------------------------------------------------------------


@cache
def of_cache() -> tuple[str, ...]:
    """Return all methods of the cache, with those that a release adds."""
    return tuple(f"{CACHE}.{name}" for name, value in vars(_load(CACHE)).items() if callable(value))


@cache
def calls_of_caches() -> frozenset[str]:
    """Return the methods of a cache about states, which the layers of attention's cache do not have."""
    of_attention = dir(_load("transformers.cache_utils.DynamicLayer"))
    return frozenset(name for name in vars(_load(CACHE)) if name not in of_attention)


def callers_of_caches(files: Files) -> list[str]:
    """Return the functions of models that make these calls, wherever a release has moved them."""
    return [name for name, _ in _callers_of_caches(files)]


def _callers_of_caches(files: Files) -> Iterator[tuple[str, ast.FunctionDef]]:
    calls = calls_of_caches()
    for path in files.paths:
        if not re.search(r"/models/.*/modeling_\w+\.py$", path):
            continue
        source, module = str(files(path)), path.removesuffix(".py").replace("/", ".")
        for node in ast.parse(source).body if any(name in source for name in calls) else ():
            functions = node.body if isinstance(node, ast.ClassDef) else [node]
            within = f"{module}.{node.name}" if isinstance(node, ast.ClassDef) else module
            for one in functions:
                if isinstance(one, ast.FunctionDef) and calls & _called(one):
                    yield f"{within}.{one.name}", one


def _called(function: ast.FunctionDef) -> set[str]:
    """Return the methods that a function calls."""
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {called.attr for called in calls if isinstance(called, ast.Attribute)}


def _load(name: str) -> type:
    module, _, item = name.rpartition(".")
    loaded: type = getattr(importlib.import_module(module), item)
    return loaded
