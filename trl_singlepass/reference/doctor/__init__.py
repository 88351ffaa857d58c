"""`trl-singlepass doctor`: whether this machine trains a model right, how fast, and on which kernel."""

from .examination import Subject as Subject
from .examination import examine as examine
from .report import DoctorReport as DoctorReport
