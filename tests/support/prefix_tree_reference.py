"""Slow specification of the prefix tree: dictionaries keyed by whole prefixes, without arrays or a radix tree."""

from collections import defaultdict


class PrefixOracle:
    """
    A trie over samples `(token_ids, loss_weights)`; a node is the tuple of all tokens up to it.

    A node is stored once per distinct trained target, and once if it has at most one.
    """

    def __init__(self, samples):
        self.multiplicity = defaultdict(int)
        self.targets = defaultdict(lambda: defaultdict(float))
        for sample in samples:
            tokens = tuple(sample.token_ids.tolist())
            for depth in range(len(tokens)):
                self.multiplicity[tokens[: depth + 1]] += 1
                if sample.loss_weights[depth] > 0:
                    self.targets[tokens[:depth]][tokens[depth]] += float(sample.loss_weights[depth])

    @property
    def num_tokens(self):
        return sum(max(1, len(self.targets.get(prefix, ()))) for prefix in self.multiplicity)

    @property
    def weighted_targets(self):
        """Return `{(prefix, target): weight}`, which defines the loss whatever the layout."""
        return {(prefix, token): w for prefix, by_token in self.targets.items() for token, w in by_token.items()}


def ancestors(subtree_end):
    """Return, for each position, the set of its ancestors and itself, by applying the interval rule to each pair."""
    return [{j for j in range(i + 1) if j <= i < subtree_end[j]} for i in range(len(subtree_end))]


def prefixes(input_ids, subtree_end):
    """Return, for each position of a row, the tuple of tokens on its path."""
    return [tuple(int(input_ids[j]) for j in sorted(above)) for above in ancestors(subtree_end)]


def labels_of(row):
    """Return the label behind each position of a row, -100 if none: the trained token whose parent is before it."""
    labels = [-100] * len(row.input_ids)
    for position, above in enumerate(ancestors(row.subtree_end)):
        if row.token_weights[position] > 0:
            labels[max(above - {position}) + 1] = int(row.input_ids[position])
    return labels


def contents(row):
    """Return `{(prefix, target): weight}` and `{prefix: multiplicity}` of a row, whatever its layout."""
    targets, multiplicity = {}, {}
    paths = prefixes(row.input_ids, row.subtree_end)
    for position, path in enumerate(paths):
        multiplicity[path] = multiplicity.get(path, 0) + int(row.multiplicity[position])
    for path, weight in zip(paths, row.token_weights, strict=True):
        if weight > 0:
            key = (path[:-1], path[-1])
            targets[key] = targets.get(key, 0) + float(weight)
    return targets, multiplicity
