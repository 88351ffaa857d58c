"""`audit`: what a dataset holds, what its chat template drops, and what training it costs by each schedule."""

from .dataset import audit as audit
from .report import AuditReport as AuditReport
