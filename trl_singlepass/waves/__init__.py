"""Waves: a row of trees run piece by piece, with loss and gradients of the whole, memory of one piece."""

from __future__ import annotations

from .plan import Wave as Wave
from .plan import WavePlan as WavePlan
from .runner import WaveRunner as WaveRunner
from .state import WaveTree as WaveTree
from .state import select as select
