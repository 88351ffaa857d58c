"""What training costs: floating-point operations of N-pass and a single pass, and the memory of a row."""

from .flops import Cost as Cost
from .flops import ModelShape as ModelShape
from .flops import npass_cost as npass_cost
from .flops import single_pass_cost as single_pass_cost
from .memory import exchange_bytes as exchange_bytes
from .memory import exchange_share as exchange_share
from .memory import row_bytes as row_bytes
from .memory import smallest_group as smallest_group
