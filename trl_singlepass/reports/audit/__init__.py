"""`audit`: what a dataset contains, what its chat template drops, and what each schedule of training would cost."""

from .audit import audit as audit
from .report import AuditReport as AuditReport
