"""Self-contained HTML pages: the inspection of a conversation and the audit of a dataset."""

from .audit import audit_page as audit_page
from .inspection import inspection_page as inspection_page
