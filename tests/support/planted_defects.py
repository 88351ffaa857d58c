"""Defects planted in the batch of a single pass, which `verify` must find."""

from trl_singlepass.reference import single_pass
from trl_singlepass.trees.rows import TreePlan


def plant_defect(monkeypatch, change):
    """Plant a defect in the batch on its way to the model."""
    collate = single_pass.make_batch
    monkeypatch.setattr(single_pass, "make_batch", lambda *args: change(collate(*args)))


def target_moved_by_one(batch):
    labels, branch = batch["labels"][0], batch["tree"].plan.runs[-1]
    labels[branch.start + 1 : branch.end - 1] = labels[branch.start + 2 : branch.end].clone()
    return batch


def position_off_by_one(batch):
    run = batch["tree"].plan.runs[-1]
    batch["position_ids"][0, run.start : run.end] += 1
    return batch


def branch_sees_its_sibling(batch):
    *_, sibling, branch = batch["tree"].plan.runs
    batch["tree"].subtree_end[0, sibling.start : sibling.end] = branch.end
    batch["tree"].plan = TreePlan.from_subtree_end(batch["tree"].subtree_end[0].numpy())
    return batch


def branch_misses_its_history(batch):
    branch = batch["tree"].plan.runs[-1]
    _, end = branch.prefix[-1]
    batch["tree"].subtree_end[0, end - 5 : end] = branch.start
    batch["tree"].plan = TreePlan.from_subtree_end(batch["tree"].subtree_end[0].numpy())
    return batch


DEFECTS = [target_moved_by_one, position_off_by_one, branch_sees_its_sibling, branch_misses_its_history]
