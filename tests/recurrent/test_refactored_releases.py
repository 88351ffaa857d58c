"""
Releases of transformers that move code and compute the same: hybrids stay exact, and fast where they were.

The syntax tree of a modelling file is rewritten before it is imported.
"""

import ast
import importlib.util
import itertools
import sys

import pytest
import transformers
from transformers import Cache

from support.float64_comparison import assert_equal_to_npass
from support.row_training import assert_waves_equal_npass
from support.sample_sets import branch_at_every_depth, branchy_chat, reasoning_chat
from support.slow import slow_but_for
from support.tiny_models import KINDS, model_class_of, model_of_type, without_router_loss
from support.trainers import needs_cached_states
from trl_singlepass.recurrent.measurement import measured_layers
from trl_singlepass.recurrent.row_kernels import SCANS


pytestmark = [needs_cached_states, pytest.mark.usefixtures("float64")]

FAMILIES = [
    *("bamba", "falcon_h1", "jamba", "kimi_linear", "lfm2", "mamba", "mamba2", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5_text", "qwen3_next", "zamba2"),
]
KERNELS = ("causal_conv1d_fn", "causal_conv1d_forward", *SCANS)
WITHOUT_ROW_KERNELS = ("jamba", "mamba")


class Helpers(ast.NodeTransformer):
    """Kernels and caches are called by a helper, with their arguments in a dictionary."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if not (is_kernel(node.func) or is_of_cache(node.func)):
            return node
        keys = [None if keyword.arg is None else ast.Constant(keyword.arg) for keyword in node.keywords]
        options = ast.keyword(None, ast.Dict(keys, [keyword.value for keyword in node.keywords]))
        return ast.Call(ast.Name("_call", ast.Load()), [node.func, *node.args], [options])


class TwoMethods(ast.NodeTransformer):
    """`forward` hands over to another method."""

    def visit_ClassDef(self, node):
        for method in [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "forward"]:
            given = method.args
            names = [x.arg for x in (*given.args[1:], *given.kwonlyargs)]
            options = [ast.keyword(name, ast.Name(name, ast.Load())) for name in names]
            options += [] if given.kwarg is None else [ast.keyword(None, ast.Name(given.kwarg.arg, ast.Load()))]
            run = ast.FunctionDef("_run", given, method.body, [], None, None, type_params=[])
            node.body.insert(node.body.index(method), run)
            method.body = [ast.Return(ast.Call(ast.parse("self._run", mode="eval").body, [], options))]
        return node


class NewMethodOfTheCache(ast.NodeTransformer):
    """Caches are asked through a method that they did not have."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if is_of_cache(node.func):
            node.args.insert(0, ast.Constant(node.func.attr))
            node.func.attr = "ask"
        return node


class NewArgument(ast.NodeTransformer):
    """Layers take one more argument."""

    def visit_FunctionDef(self, node):
        if node.name == "forward" and node.args.kwarg is not None:
            node.args.kwonlyargs.append(ast.arg("row_numbers"))
            node.args.kw_defaults.append(ast.Constant(None))
        return node


class Renamed(ast.NodeTransformer):
    """Kernels have other names."""

    def visit_Name(self, node):
        return ast.Name(f"renamed_{node.id}", node.ctx) if is_kernel(node) else node

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.name = f"renamed_{node.name}" if is_kernel(ast.Name(node.name)) else node.name
        return node


def is_kernel(node):
    return isinstance(node, ast.Name) and node.id in KERNELS


def is_of_cache(node):
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("cache", "cache_params", "past_key_values")


REFACTORINGS = {
    "helpers and two methods": (Helpers, TwoMethods),
    "new method of the cache": (NewMethodOfTheCache,),
    "new argument": (NewArgument,),
    "renamed kernels": (Renamed,),
}


def import_refactored(module, changes, folder):
    """Import a modelling module of transformers from a file with the rewritten code; return it."""
    tree = ast.parse(importlib.util.find_spec(module).loader.get_source(module))
    for change in changes:
        tree = ast.fix_missing_locations(change().visit(tree))
    file = folder / "modeling.py"
    helper = "def _call(function, *args, **kwargs):\n    return function(*args, **kwargs)\n"
    file.write_text(f"{helper}\n{ast.unparse(tree)}".replace("from __future__ import annotations\n", ""))
    spec = importlib.util.spec_from_file_location(module, file)
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def ask(cache, name, *args, **kwargs):
    return getattr(cache, name)(*args, **kwargs)


@pytest.fixture
def moved(request, monkeypatch, tmp_path):
    """Let models of a type come from refactored code; return the type."""
    changes, model_type = request.param.split(": ")
    stock = model_class_of(model_type)
    monkeypatch.setattr(Cache, "ask", ask, raising=False)
    monkeypatch.setitem(sys.modules, stock.__module__, sys.modules[stock.__module__])
    rewritten = import_refactored(stock.__module__, REFACTORINGS[changes], tmp_path)
    monkeypatch.setattr(transformers, stock.__name__, getattr(rewritten, stock.__name__))
    assert model_class_of(model_type) is getattr(rewritten, stock.__name__)
    return model_type


def cases(*changes):
    """Return each refactoring with some families, the slow tests with all."""
    fast, every = ([": ".join(x) for x in itertools.product(changes, names)] for names in (KINDS[:4], FAMILIES))
    return slow_but_for(fast, every)


@pytest.mark.parametrize(
    "moved", cases("helpers and two methods", "new method of the cache", "new argument"), indirect=True
)
def test_moved_code_is_exact_and_as_fast(moved):
    by_kernels = [replay.kernels is not None for replay in measured_layers(model_of_type(moved)).values()]
    assert all(by_kernels) != (moved in WITHOUT_ROW_KERNELS)
    assert_equal_to_npass(model_of_type(moved), [reasoning_chat(2), branchy_chat()])
    assert_waves_equal_npass(without_router_loss(moved), [branch_at_every_depth()], [7])


@pytest.mark.parametrize("moved", cases("renamed kernels"), indirect=True)
def test_layers_whose_kernels_are_renamed_are_exact_piece_by_piece(moved):
    assert not any(replay.kernels for replay in measured_layers(model_of_type(moved)).values())
    assert_equal_to_npass(model_of_type(moved), [reasoning_chat(2), branchy_chat()])
    assert_waves_equal_npass(without_router_loss(moved), [branch_at_every_depth()], [7])
