"""What the doctor found: records that become JSON as they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .environment import Environment


@dataclass(frozen=True, slots=True)
class Examined:
    """The model that was looked at."""

    name: str  # folder or hub id; "built-in" without one
    architecture: str  # class of the model
    num_layers: int  # layers that ran, the first of the model
    total_layers: int
    device: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """The attention kernel that the model runs on."""

    attn_implementation: str  # the model's choice
    tree_attention: str  # registered name of its tree attention
    reason: str
    # attention operators that were seen to run in the single pass, none if it was made of matrix products; `None` if
    # it was compiled or did not run
    operators: tuple[str, ...] | None
    faster: str | None  # how attention gets faster on this machine, and by how much


@dataclass(frozen=True, slots=True)
class Verified:
    """N-pass and the single pass compared in one precision."""

    dtype: str  # of the weights
    attn_implementation: str
    ok: bool
    turns: int  # how many were compared
    loss_error: float | None  # largest difference of the loss of a token
    loss_allowed: float | None  # largest difference that the precision explains
    gradient_error: float | None  # norm of the difference of both gradients ÷ norm of the gradient
    gradient_allowed: float | None  # largest such error that the precision explains
    leaked: float | None  # largest gradient of a turn's output with respect to a token outside its sample: 0
    failed: str | None  # error, if it did not run


@dataclass(frozen=True, slots=True)
class Measured:
    """One training step, forward and backward with gradient checkpointing."""

    turns: int  # of the conversation
    schedule: str  # a name of [`Schedule`]
    attn_implementation: str
    tokens: int  # of the row
    launches: int | None  # operators that reached the device; not counted where attention is compiled
    seconds: float | None  # the best of a few
    peak_bytes: int | None  # above what was in use before the step
    speedup: float | None  # seconds of packed N-pass ÷ these
    bound: float | None  # counted operations of N-pass ÷ those of this schedule, if the model's can be counted
    failed: str | None  # error, if it did not run


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What the doctor found."""

    environment: Environment
    model: Examined
    kernel: Kernel
    verified: tuple[Verified, ...]  # by precision
    measured: tuple[Measured, ...]  # by conversation and schedule

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong: known problems, disagreement with N-pass, and steps that did not run."""
        differing = (
            f"verify in {one.dtype} on {one.attn_implementation}: "
            + (one.failed or "the single pass does not equal N-pass")
            for one in self.verified
            if not one.ok
        )
        failed = (f"{one.schedule}, {one.turns} turns: {one.failed}" for one in self.measured if one.failed)
        return (*self.environment.problems, *differing, *failed)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.complaints

    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON can hold it."""
        return {**asdict(self), "complaints": list(self.complaints), "ok": self.ok}
