"""What the doctor found: records that become JSON as they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .environment import Environment


@dataclass(frozen=True, slots=True)
class Examined:
    """
    The model that was looked at.

    Args:
        name (`str`):
            Folder or hub id; "built-in" without one.
        architecture (`str`):
            Class of the model.
        num_layers (`int`):
            Layers that ran, the first of the model.
        total_layers (`int`):
            Layers of the whole model.
        device (`str`):
            Device that they ran on.
    """

    name: str
    architecture: str
    num_layers: int
    total_layers: int
    device: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """
    The attention kernel that the model runs on.

    Args:
        attn_implementation (`str`):
            The model's choice.
        tree_attention (`str`):
            Registered name of its tree attention.
        reason (`str`):
            Why this kernel.
        operators (`tuple[str, ...]`, *optional*):
            Attention operators that were seen to run in the single pass, none if it was made of matrix products;
            `None` if it was compiled or did not run.
        faster (`str`, *optional*):
            How attention gets faster on this machine, and by how much.
    """

    attn_implementation: str
    tree_attention: str
    reason: str
    operators: tuple[str, ...] | None
    faster: str | None


@dataclass(frozen=True, slots=True)
class Verified:
    """
    N-pass and the single pass compared in one precision.

    Args:
        dtype (`str`):
            Precision of the weights.
        attn_implementation (`str`):
            Attention that ran.
        ok (`bool`):
            Whether they agree.
        turns (`int`):
            Turns that were compared.
        loss_error (`float`, *optional*):
            Largest difference of the loss of a token.
        loss_allowed (`float`, *optional*):
            Largest difference that the precision explains.
        gradient_error (`float`, *optional*):
            Norm of the difference of both gradients ÷ norm of the gradient.
        gradient_allowed (`float`, *optional*):
            Largest such error that the precision explains.
        leaked (`float`, *optional*):
            Largest gradient of a turn's output with respect to a token outside its sample: 0.
        failed (`str`, *optional*):
            Error, if it did not run.
    """

    dtype: str
    attn_implementation: str
    ok: bool
    turns: int
    loss_error: float | None
    loss_allowed: float | None
    gradient_error: float | None
    gradient_allowed: float | None
    leaked: float | None
    failed: str | None


@dataclass(frozen=True, slots=True)
class Measured:
    """
    One training step, forward and backward with gradient checkpointing.

    Args:
        turns (`int`):
            Turns of the conversation.
        schedule (`str`):
            How the step was computed: a name of [`Schedule`].
        attn_implementation (`str`):
            Attention that ran.
        tokens (`int`):
            Tokens of the row.
        launches (`int`, *optional*):
            Operators that reached the device; not counted where attention is compiled.
        seconds (`float`, *optional*):
            Time of the step, the best of a few.
        peak_bytes (`int`, *optional*):
            Peak memory above what was in use before the step.
        speedup (`float`, *optional*):
            Seconds of packed N-pass ÷ these.
        bound (`float`, *optional*):
            Counted operations of N-pass ÷ those of this schedule, if the model's can be counted.
        failed (`str`, *optional*):
            Error, if it did not run.
    """

    turns: int
    schedule: str
    attn_implementation: str
    tokens: int
    launches: int | None
    seconds: float | None
    peak_bytes: int | None
    speedup: float | None
    bound: float | None
    failed: str | None


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """
    What the doctor found.

    Args:
        environment (`Environment`):
            Software and hardware.
        model (`Examined`):
            Model that was looked at.
        kernel (`Kernel`):
            Attention kernel that it runs on.
        verified (`tuple[Verified, ...]`):
            Comparison with N-pass, by precision.
        measured (`tuple[Measured, ...]`):
            Time and memory, by conversation and schedule.
    """

    environment: Environment
    model: Examined
    kernel: Kernel
    verified: tuple[Verified, ...]
    measured: tuple[Measured, ...]

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
