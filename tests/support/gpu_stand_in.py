"""GPUs that are not there: what the choice of kernels knows of them."""

from trl_singlepass.attention.kernel_choice import DeviceTraits


def gpu(*capability, **traits):
    """A CUDA device under a PyTorch that has everything, but for what `traits` say."""
    everything = {"has_flash": True, "has_packed_lse": True, "has_triton": True}
    return DeviceTraits("cuda", capability, **{**everything, **traits})


V100, T4, A100, L4, H100, B200, RTX5090 = (
    gpu(*capability) for capability in [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
)
