"""GPUs that are not there: `torch.cuda`, Inductor and Triton get the answers of a card, and compile for it."""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch


def card(name, major, minor, multiprocessors, shared_memory, l2_cache, clock_rate):
    """Properties as `torch.cuda.get_device_properties` returns them; shared memory in bytes per block."""
    return SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=multiprocessors, total_memory=80 << 30,
        warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        shared_memory_per_block_optin=shared_memory, shared_memory_per_block=49152,
        shared_memory_per_multiprocessor=shared_memory + 1024, L2_cache_size=l2_cache, clock_rate=clock_rate,
        gcnArchName="",
    )  # fmt: skip


# CUDA programming guide, "Technical specifications per compute capability": 99, 163 or 227 KiB per block.
CARDS = {
    "A100": card("NVIDIA A100", 8, 0, 108, 163 << 10, 40 << 20, 1410000),
    "H100": card("NVIDIA H100", 9, 0, 132, 227 << 10, 50 << 20, 1980000),
    "B200": card("NVIDIA B200", 10, 0, 148, 227 << 10, 126 << 20, 1965000),
    "L4": card("NVIDIA L4", 8, 9, 58, 99 << 10, 48 << 20, 2040000),
    "RTX 5090": card("NVIDIA GeForce RTX 5090", 12, 0, 170, 99 << 10, 96 << 20, 2407000),
}


def constant(value):
    """Return a function that takes anything and returns `value`."""
    return lambda *args, **kwargs: value


def stand_in_for(card, guard):
    """
    Let fake tensors say `cuda`, and make what asks for the device get the answers of a card.

    `guard` is `cuda_guard.cpp` as a shared object. Half of `torch.cuda` is replaced, for good.
    """
    ctypes.CDLL(guard)
    answer_for_torch(card)
    answer_for_triton(card)
    let_inductor_compile_without_running()


def answer_for_torch(card):
    import torch._dynamo.device_interface as interfaces
    import torch._subclasses.fake_tensor as fake
    import torch.cuda.random as cuda_random

    capability = (card.major, card.minor)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": card,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None, "get_device_capability": capability,
        "_lazy_init": None, "synchronize": None, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None, "is_bf16_supported": True, "get_compute_capability": 10 * card.major + card.minor,
        "is_triton_capable": True, "raise_if_triton_unavailable": None, "is_current_stream_capturing": False,
    }  # fmt: skip
    interface = interfaces.get_interface_for_device("cuda")
    for name, answer in answers.items():
        function = constant(answer)
        setattr(torch.cuda, name, function)
        setattr(interface, name, staticmethod(function))
    interface.Worker.get_device_properties = staticmethod(constant(card))
    interface.Worker.current_device = staticmethod(constant(0))
    cuda_random.get_rng_state, cuda_random.set_rng_state = torch.cuda.get_rng_state, torch.cuda.set_rng_state
    fake.init_gpu_context = constant(None)
    torch.version.cuda = "12.8"


def answer_for_triton(card):
    import torch.utils._triton as availability
    import triton.runtime.driver
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    inductors = [module for name, module in sys.modules.items() if name.startswith("torch._inductor")]
    for module in (availability, *inductors):  # those hold the functions by name
        for name in [name for name in vars(module) if name.startswith("has_triton")]:
            setattr(module, name, constant("tma" not in name and "descriptor" not in name))
    properties = {
        "max_shared_mem": card.shared_memory_per_block_optin, "multiprocessor_count": card.multi_processor_count,
        "warpSize": card.warp_size, "max_num_regs": card.regs_per_multiprocessor,
    }  # fmt: skip
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=constant(GPUTarget("cuda", 10 * card.major + card.minor, card.warp_size)),
            get_current_device=constant(0), get_active_torch_device=constant(torch.device("cuda", 0)),
            get_current_stream=constant(0), get_device_capability=constant((card.major, card.minor)),
            get_device_interface=constant(torch.cuda),
            utils=SimpleNamespace(get_device_properties=constant(properties)),
        )
    )  # fmt: skip
    triton_helpers.set_driver_to_gpu = constant(None)  # keeps this one
    descriptors = ModuleType("triton.tools.experimental_descriptor")
    descriptors.create_1d_tma_descriptor = descriptors.create_2d_tma_descriptor = object
    descriptors.TensorDescriptor = object
    sys.modules[descriptors.__name__] = descriptors


class LoweredError(Exception):
    """Raised in the place of running the generated code; holds it."""


def let_inductor_compile_without_running():
    """Inductor raises `LoweredError` with the generated code."""
    import torch._inductor.config as inductor
    import torch._inductor.fx_passes.fuse_attention as fusion
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as post
    import torch._inductor.graph as graph

    def raise_code(self):
        code, _ = self.codegen()
        raise LoweredError(code.value if hasattr(code, "value") else str(code))

    graph.GraphLowering._compile_to_module = graph.GraphLowering.compile_to_module = raise_code
    # Patterns are compiled by running them on the device, which is not there.
    fusion._sfdp_init = joint.lazy_init = post.lazy_init = constant(None)
    inductor.fx_graph_cache = inductor.pattern_matcher = inductor.joint_graph_constant_folding = False
    inductor.force_disable_caches, inductor.compile_threads = True, 1
    inductor.use_static_cuda_launcher = False


def code_of(lower):
    """Return the code at which lowering stops. Any other error is raised as it comes."""
    try:
        lower()
    except Exception as error:  # dynamo wraps what is raised in a backend
        cause = error
        while cause is not None:
            if isinstance(cause, LoweredError):
                return cause.args[0]
            cause = cause.__cause__ or cause.__context__
        raise
    raise AssertionError("nothing was compiled")


TRITON_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S)


def compile_kernels(code, folder):
    """
    Compile the Triton kernels of generated code for the card, as Inductor would before it runs them.

    Yields for each its name, shared memory of a block in bytes, and whether tensor cores multiply.
    """
    for name, source in TRITON_KERNEL.findall(code):
        path = Path(folder) / f"{name}.py"  # Triton reads the source of a kernel from its file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        kernel.precompile(warm_cache_only=True)
        for result in kernel.compile_results:
            assert result.kernel.asm["cubin"]
            yield name, result.kernel.metadata.shared, "mma" in result.kernel.asm["ptx"]
