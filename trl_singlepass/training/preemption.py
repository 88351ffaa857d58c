"""Preemption: save a checkpoint and stop cleanly when the scheduler sends a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, logging


logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_Handler = Callable[[int, FrameType | None], object] | int | None


class PreemptionCallback(TrainerCallback):
    """
    Saves a checkpoint and stops at the end of the step in which a signal reaches any rank.

    Ranks receive a signal at different times, and ranks that saved after different steps would wait for each other
    forever, so they agree on the step. `enable_jit_checkpoint=True` of transformers does not: it works for a single
    process.

    Args:
        signals (`Sequence[signal.Signals]`, *optional*, defaults to `(SIGTERM, SIGUSR1)`):
            Signals that ask the run to stop.

    Example:

    ```python
    preemption = PreemptionCallback()
    trainer = SinglePassSFTTrainer(..., callbacks=[preemption])
    trainer.train(resume_from_checkpoint=last_good_checkpoint(args.output_dir))
    if preemption.was_preempted:
        sys.exit(0)  # the scheduler starts the run again
    ```
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self.signals = tuple(signals)
        self.was_preempted = False
        self._received = False
        self._previous_handlers: dict[signal.Signals, _Handler] = {}

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Start listening to the signals."""
        self._previous_handlers = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save and stop if any rank received a signal."""
        received = self._received
        if torch.distributed.is_initialized():
            votes = torch.tensor(int(received), device=args.device)
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
            received = bool(votes)
        if not received:
            return
        self.was_preempted = True
        control.should_save = control.should_training_stop = True
        if state.is_world_process_zero:
            logger.warning(f"Received a signal to stop: saving a checkpoint after step {state.global_step}.")

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
