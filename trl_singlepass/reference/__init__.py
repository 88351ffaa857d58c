"""N-pass, the reference implementation, and `verify`, which compares the single pass with it."""

from .npass import LossAndGradients as LossAndGradients
from .npass import npass_loss_and_gradients as npass_loss_and_gradients
from .report import VerifyReport as VerifyReport
from .single_pass import leak_probe as leak_probe
from .single_pass import single_pass_loss_and_gradients as single_pass_loss_and_gradients
from .verification import verify as verify
