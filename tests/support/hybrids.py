"""Other ways in which the recurrent layers of a model with trees can run than the fastest."""

from dataclasses import replace

from trl_singlepass.recurrent import row_kernels
from trl_singlepass.recurrent.layer import TreeReplay, wrap
from trl_singlepass.recurrent.measurement import path_dependent_layers
from trl_singlepass.recurrent.row_kernels import RowKernels, interpose_kernels
from trl_singlepass.recurrent.schedule import ReplayMode


def run_in_pieces(model):
    """Run recurrent layers as those run whose kernels are not known."""
    for layer in path_dependent_layers(model):
        layer._replay = replace(layer._replay, kernels=None)


def run_over_whole_paths(model):
    """Run recurrent layers over each branch with all of its history."""
    for layer in path_dependent_layers(model):
        layer._replay = replace(layer._replay, kernels=None, mode=ReplayMode(starts_from_state=False))


def run_by_kernels(layer, monkeypatch):
    """Run a gated delta net on trees by its kernels, without measuring it, as on a device that holds no numbers."""
    interpose_kernels(layer)
    monkeypatch.setattr(row_kernels, "keeps_sequences_apart", lambda *args: True)
    called = frozenset({"causal_conv1d_fn", "torch_chunk_gated_delta_rule"})
    kernels = RowKernels(called, ReplayMode(starts_from_state=True, reach=3, by_kernels=True))
    wrap(layer, TreeReplay(ReplayMode(starts_from_state=True), kernels, ("cache",)))
