"""`AuditReport`: the facts of an audit, with the sentences, tables and JSON made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .facts import AuditFacts
from .findings import get_findings
from .table import format_report


@dataclass(frozen=True, slots=True)
class AuditReport(AuditFacts):
    """What a dataset contains, what its template makes of it, and what training on it costs; `str()` is a table."""

    @property
    def findings(self) -> list[str]:
        """What deserves attention, in plain sentences."""
        return get_findings(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for `json.dumps`."""
        report = asdict(self)
        report["templates"] = [{**asdict(facts), "conversations": count} for facts, count in self.templates]
        report["findings"] = self.findings
        if self.forecast is not None:
            report["forecast"]["verdict"] = self.forecast.verdict
        return report

    def __str__(self) -> str:
        return format_report(self)
