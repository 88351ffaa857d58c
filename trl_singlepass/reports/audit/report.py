"""`AuditReport`: the facts of an audit with what they say, in sentences, as a table and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .facts import AuditFacts
from .findings import findings_of
from .table import table_of


@dataclass(frozen=True, slots=True)
class AuditReport(AuditFacts):
    """What a dataset holds, what its template makes of it, and what training it costs; `str()` of it is a table."""

    @property
    def findings(self) -> list[str]:
        """What deserves attention, in plain sentences."""
        return findings_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary that `json.dumps` takes."""
        report = asdict(self)
        report["templates"] = [{**asdict(facts), "conversations": count} for facts, count in self.templates]
        report["findings"] = self.findings
        if self.forecast is not None:
            report["forecast"]["verdict"] = self.forecast.verdict
        return report

    def __str__(self) -> str:
        return table_of(self)
