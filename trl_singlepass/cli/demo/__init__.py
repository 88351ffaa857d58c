"""A tiny model and conversations, to try everything without a network."""

from .write import DATA as DATA
from .write import SEED as SEED
from .write import TOKENIZER as TOKENIZER
from .write import as_pairs as as_pairs
from .write import make_demo_model as make_demo_model
from .write import write_demo_data as write_demo_data
from .write import write_demo_model as write_demo_model
from .write import write_demo_pairs as write_demo_pairs
