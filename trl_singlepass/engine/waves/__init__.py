"""Waves: run a row part by part, with the loss and gradients of the whole row and the memory of one part."""

from __future__ import annotations

from .plan import Wave as Wave
from .plan import WavePlan as WavePlan
from .runner import WaveRunner as WaveRunner
from .tree import WaveTree as WaveTree
from .tree import select as select
