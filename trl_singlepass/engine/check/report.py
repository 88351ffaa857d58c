"""What the measured check found, and how much difference is noise."""

from __future__ import annotations

from dataclasses import dataclass


MOST_SYSTEMATIC = 0.3
"""Mean cosine along a sample of two differences with other rounding errors: noise has at most 0.13 in half of it."""


@dataclass(frozen=True, slots=True)
class TreeCheckReport:
    """
    What the measured check found; `str()` of it is one line.

    Args:
        difference (`float`):
            Norm of the difference between the outputs of tree and separate samples, relative to the outputs.
        allowed (`float`):
            Largest difference that rounding explains.
        leak (`float`, *optional*):
            Largest gradient of a branch's output with respect to a token that is not its ancestor; `None` where the
            engine gives no such gradient.
        moved (`float`, *optional*):
            Largest difference between the outputs of a branch and those in another place, among other tokens; only
            where there is no gradient.
        moved_allowed (`float`, *optional*):
            Largest such difference that rounding explains.
        noise (`float`, *optional*):
            Difference between two ways to run the separate samples: alone and padded, or with embeddings that are
            moved by one rounding; only in half precision, or if outputs differ.
        systematic (`float`, *optional*):
            How much two differences with other rounding errors have in common: the mean cosine along a sample, 0 for
            noise and 1 for what is wrong in the same way; where noise is measured.
        seconds (`float`):
            Time that the check took.
        where (`str`, *optional*):
            If it failed: the first module whose outputs differ, and a token at which they do.
        adapters (`str`, *optional*):
            If it failed: the configurations of the adapters without which the model is right.
    """

    difference: float
    allowed: float
    leak: float | None = None
    moved: float | None = None
    moved_allowed: float = 0.0
    noise: float | None = None
    systematic: float | None = None
    seconds: float = 0.0
    where: str | None = None
    adapters: str | None = None

    @property
    def is_isolated(self) -> bool:
        """Whether each branch depends on its ancestors only."""
        return (self.leak is None or self.leak == 0) and (self.moved is None or self.moved <= self.moved_allowed)

    @property
    def is_equal(self) -> bool:
        """Whether outputs are those of separate samples."""
        return self.difference <= self.allowed and (self.systematic is None or self.systematic <= MOST_SYSTEMATIC)

    @property
    def ok(self) -> bool:
        """Whether the model computes on a tree what it computes on separate samples."""
        return self.is_isolated and self.is_equal

    def __str__(self) -> str:
        verdict = "tree equals separate samples" if self.ok else "tree does NOT equal separate samples"
        noise = "" if self.noise is None else f", noise {self.noise:.1g}"
        return f"{verdict} ({self.difference:.1g}{noise}), in {self.seconds:.1f} s"

    @property
    def reason(self) -> str:
        """What is wrong, as a sentence without its end."""
        parts = []
        if self.leak is not None and self.leak != 0:
            parts.append(f"a branch depends on tokens that are not its ancestors (gradient {self.leak:.1e})")
        if self.moved is not None and not self.moved <= self.moved_allowed:
            parts.append(f"a branch differs by {self.moved:.1e} among other tokens (allowed {self.moved_allowed:.1e})")
        if not self.difference <= self.allowed:
            parts.append(f"outputs differ by {self.difference:.1e} (allowed {self.allowed:.1e})")
        elif not self.is_equal:
            parts.append(f"outputs differ by {self.difference:.1e}, in the same way whenever they are rounded")
        return "; ".join(parts)
