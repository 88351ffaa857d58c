"""A tiny model and a small file on disk."""

from support.small_files import data as data
from support.small_files import model as model
