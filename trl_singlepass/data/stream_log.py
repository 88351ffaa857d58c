"""Log what a stream loses, as it comes."""

from __future__ import annotations

from transformers import logging


logger = logging.get_logger(__name__)


class StreamLog:
    """
    Logs what a stream has lost so far whenever it has doubled.

    A stream may have no end at which to sum up what is lost, and a line per loss would flood the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 1

    def update(self, lost: int, summary: object) -> None:
        """
        Log a summary if at least twice as much is lost as when the last one was logged.

        `lost` may be in any unit; `summary` becomes text only if it is logged.
        """
        if lost >= self._next:
            logger.warning(f"Stream of the {self._name} dataset so far: {summary}.")
            self._next = 2 * lost
