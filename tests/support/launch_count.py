"""Kernel launches and copies of code that would run on a GPU, counted on meta tensors: shapes without numbers."""

from trl_singlepass.reference.launches import LaunchCounter


# FlashAttention's backward: row sums of grad · out, the loop, the conversion of dq, and sums over grouped heads (2).
KERNELS_PER_CALL = {"aten::_flash_attention_backward": 5, "aten::_scaled_dot_product_flash_attention_backward": 5}


class LaunchAndCopyCounter(LaunchCounter):
    """Counts kernels instead of operators, and copies from the CPU to meta tensors."""

    def __init__(self):
        super().__init__()
        self.copies_to_device = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        is_copy = func._schema.name == "aten::_to_copy"
        if is_copy and args[0].device.type == "cpu" and result.device.type == "meta":
            self.copies_to_device += 1
        return result

    @property
    def launches(self):
        return sum(count * KERNELS_PER_CALL.get(name, 1) for name, count in self.operators.items())


def launches_of_a_step(forward):
    """Launches of a checkpointed layer in a training step: forward, recomputation, backward."""
    with LaunchAndCopyCounter() as ahead:
        out = forward()
    with LaunchAndCopyCounter() as back:
        out.backward(out.new_empty(out.shape))
    return 2 * ahead.launches + back.launches
