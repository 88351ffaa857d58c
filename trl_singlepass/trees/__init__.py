"""
Samples, the tree of their shared prefixes, and the rows that hold trees.

The words that the whole package uses:

- **Example**: an item of a dataset. It holds a **conversation**, or two of them as a pair.
- **Turn**: one assistant message to learn, with all messages before it as context.
- **Sample**: the exact tokens of one turn, prompt and completion. **N-pass** trains each as a sequence of its own.
- **Target** of a token: the next token, which it must predict. **Labels** are targets rolled by one position, so that
  a loss that shifts labels sees the right pairs. A target's **loss weight** is the factor of its loss, its **part**
  what it belongs to: reasoning, the first token of the answer, or what follows.
- **Prefix tree**: samples in which every shared prefix is stored once, laid out depth first in one token sequence.
- **Path** of a token: its **ancestors**, from the start of its tree, and the token itself. Its **depth** is the number
  of its ancestors, its **position** the index in the layout.
- **Multiplicity** of a token: the number of samples that pass through it. **Sharing factor**: tokens of all samples ÷
  tokens of the tree.
- **Trunk**: the path that takes, at every fork, the child that most samples share. What forks off is a **branch**.
- **Row**: the token sequence that a model computes at once. It holds one or more trees side by side.
- **Segment**: longest range of a tree that the same samples share, a node of the radix tree.
- **Run**: longest range of a row in which the parent of every token is the token before it. A segment's first child
  goes on in the same run, every other child begins a run of its own.
- **Piece**: tokens of a row, all on one path, that a layer takes in one call.
- **Wave**: tokens that run together where a row runs in several forwards. Those that later waves descend from are kept
  in a cache, each in a **slot**.
- **Image feature**: what one token of an image shows; tokens of two images are alike, so trees compare their features
  as well (see `image_features.py`).
- **Range**: any other half-open interval `[start, end)` of positions.

Samples `[1, 2, 3]` and `[1, 2, 4, 5]` as a tree (with 4 on the trunk):

    position       0  1  2  3  4
    input_ids      1  2  4  5  3
    depth          0  1  2  3  2
    subtree_end    5  5  4  4  5      past the last descendant of each token
    multiplicity   2  2  1  1  1      samples that pass through it
    segments       [0, 2)  [2, 4)  [4, 5)
    runs           [0, 4)          [4, 5) with ancestors [0, 2)
"""
