"""Kernel launches and copies of code that would run on a GPU, counted on meta tensors: shapes without numbers."""

from benchmarks.launches import LaunchCounter


FLASH_BACKWARD = 3
"""Kernels of FlashAttention's backward: row sums of grad · out, the loop, the conversion of dq."""


class LaunchAndCopyCounter(LaunchCounter):
    """Counts kernels instead of operators, and copies from the CPU to meta tensors."""

    def __init__(self):
        super().__init__()
        self.copies_to_device = 0
        self.further_kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        target, source = {"aten::_to_copy": (result, *args[:1]), "aten::copy_": args[:2]}.get(
            func._schema.name, (None, None)
        )
        if source is not None and source.device.type == "cpu" and target.device.type == "meta":
            self.copies_to_device += 1
        if func._schema.name.endswith("flash_attention_backward"):
            _, query, key = args[:3]
            heads = 1 if func._schema.name == "aten::_flash_attention_backward" else -3
            is_grouped = query.shape[heads] != key.shape[heads]
            self.further_kernels += FLASH_BACKWARD - 1 + 2 * is_grouped  # and sums over grouped heads
        return result

    @property
    def launches(self):
        return self.total + self.further_kernels


def launches_of_a_step(forward):
    """Launches of a checkpointed layer in a training step: forward, recomputation, backward."""
    with LaunchAndCopyCounter() as ahead:
        out = forward()
    with LaunchAndCopyCounter() as back:
        out.backward(out.new_empty(out.shape))
    return 2 * ahead.launches + back.launches
