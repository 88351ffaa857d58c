"""
Lower FlexAttention for an H100 that is not there: `python -m support.flex_lowering_worker GUARD CASES`.

`GUARD` is `cuda_guard.cpp` as a shared object, `CASES` a JSON list of `[turns, sizes, kind, size, heads, kv_heads,
head_dim, softcap, sinks]`. For each case, prints a JSON line with the names of the Triton kernels that Inductor made
of the package's own code, or the error. A process of its own, because it replaces half of `torch.cuda`.
"""

import ctypes
import json
import re
import sys
from types import ModuleType, SimpleNamespace


GUARD, CASES = sys.argv[1], json.loads(sys.argv[2])

import torch  # noqa: E402


ctypes.CDLL(GUARD)
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448, shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, clock_rate=1980000, gcnArchName="",
)  # fmt: skip


def stand_in_for_the_device():
    """Give `torch.cuda`, Inductor and Triton the answers of an H100."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.config as inductor
    import torch._inductor.fx_passes.fuse_attention as fusion
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as post
    import torch._subclasses.fake_tensor as fake
    import torch.cuda.random as cuda_random
    import torch.utils._triton as availability
    import triton.runtime.driver
    from triton.backends.compiler import GPUTarget

    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None, "get_device_capability": (9, 0),
        "_lazy_init": None, "synchronize": None, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None, "is_bf16_supported": True, "get_compute_capability": 90, "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }  # fmt: skip
    cuda, interface = torch.cuda, interfaces.get_interface_for_device("cuda")
    for name, answer in answers.items():
        function = constant(answer)
        setattr(cuda, name, function)
        setattr(interface, name, staticmethod(function))
    interface.Worker.get_device_properties = staticmethod(constant(H100))
    interface.Worker.current_device = staticmethod(constant(0))
    cuda_random.get_rng_state, cuda_random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    fake.init_gpu_context = constant(None)
    torch.version.cuda = "12.8"
    for name in dir(availability):
        if name.startswith("has_triton"):
            setattr(availability, name, constant("tma" not in name and "descriptor" not in name))
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=constant(GPUTarget("cuda", 90, 32)), get_current_device=constant(0),
            get_active_torch_device=constant(torch.device("cuda", 0)), get_current_stream=constant(0),
            get_device_capability=constant((9, 0)), get_device_interface=constant(cuda),
            utils=SimpleNamespace(
                get_device_properties=constant(
                    {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
                )
            ),
        )
    )  # fmt: skip
    descriptors = ModuleType("triton.tools.experimental_descriptor")
    descriptors.create_1d_tma_descriptor = descriptors.create_2d_tma_descriptor = object
    descriptors.TensorDescriptor = object
    sys.modules[descriptors.__name__] = descriptors
    # Patterns are compiled by running them on the device, which is not there.
    fusion._sfdp_init = joint.lazy_init = post.lazy_init = constant(None)
    inductor.fx_graph_cache = inductor.pattern_matcher = inductor.joint_graph_constant_folding = False
    inductor.force_disable_caches, inductor.compile_threads = True, 1


def constant(value):
    return lambda *args, **kwargs: value


class LoweredError(Exception):
    """Raised in the place of running the generated code; holds it."""


def stop_at_the_generated_code():
    import torch._inductor.graph as graph

    def code_of(self):
        code, _ = self.codegen()
        raise LoweredError(code.value if hasattr(code, "value") else str(code))

    graph.GraphLowering._compile_to_module = graph.GraphLowering.compile_to_module = code_of


def lower(turns, sizes, kind, size, heads, kv_heads, head_dim, softcap, sinks):
    """Return the names of the Triton kernels of a row."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from support.tree_masks import mask_of, tree_of
    from trl_singlepass.attention import Tree, flex
    from trl_singlepass.attention.inputs import AttentionInputs
    from trl_singlepass.reference.random_conversations import Sizes, conversation

    torch._dynamo.reset()
    flex.compiled_flex_attention.cache_clear()
    flex._score_mod.cache_clear()
    user, reasoning, answer = ((n, n) for n in sizes)
    samples = conversation(turns, 30_000, 0, Sizes(user=user, reasoning=reasoning, answer=answer, system=5))
    plan = tree_of([samples]).plan
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        integers = torch.empty(1, plan.length, dtype=torch.long, device="cuda")

        def draw(num_heads):
            shape = (1, plan.length, num_heads, head_dim)
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

        logits = torch.empty(heads, dtype=torch.bfloat16, device="cuda") if sinks else None
        inputs = AttentionInputs(draw(heads), draw(kv_heads), draw(kv_heads), 0.1, softcap, logits)
        try:
            flex.flex_tree_attention(inputs, mask_of(Tree(plan, integers, integers), kind, size))
        except Exception as error:  # dynamo wraps what is raised in a backend
            if "LoweredError" not in f"{type(error)} {error}":
                return {"length": plan.length, "error": f"{type(error).__name__}: {error}"[:500]}
            return {"length": plan.length, "kernels": re.findall(r"async_compile\.triton\('(\w+)'", str(error))}
    raise AssertionError("nothing was compiled")


def make_numbers_empty():
    """Make `torch.tensor` return a tensor without its number on a device that has no memory."""
    number = torch.tensor

    def tensor(value, *, device="cpu", **options):
        is_real = torch.device(device).type == "cpu"
        return number(value, **options) if is_real else torch.empty((), device=device, **options)

    torch.tensor = tensor


if __name__ == "__main__":
    stand_in_for_the_device()
    stop_at_the_generated_code()
    make_numbers_empty()
    for case in CASES:
        sys.stdout.write(json.dumps(lower(*case)) + "\n")
