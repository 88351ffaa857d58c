"""
Lower FlexAttention for an H100 that is not there: `python -m support.flex_lowering_worker GUARD DIRECTION CASES`.

`GUARD` is `cuda_guard.cpp` as a shared object, `DIRECTION` is forward or backward, and `CASES` a JSON list of `[turns,
sizes, kind, size, heads, kv_heads, head_dim, softcap, sinks]`. For each case, prints a JSON line with the names of the
Triton kernels that Inductor made of the package's own code, or the error. Each runs in a process of its own, because
it replaces half of `torch.cuda`.
"""

import ctypes
import json
import os
import re
import sys
from types import ModuleType, SimpleNamespace

import torch
from torch.nn.attention import flex_attention as torch_flex

from support.tree_masks import mask_of, random_inputs, tree_of
from trl_singlepass.attention import Tree, flex
from trl_singlepass.attention.inputs import AttentionInputs
from trl_singlepass.reference.random_conversations import Sizes, conversation


H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448, shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, clock_rate=1980000, gcnArchName="",
)  # fmt: skip


def stand_in_for_the_device(guard):
    """Give `torch.cuda`, Inductor and Triton the answers of an H100."""
    ctypes.CDLL(guard)
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
    inductors = [module for name, module in sys.modules.items() if name.startswith("torch._inductor")]
    for module in (availability, *inductors):  # those hold the functions by name
        for name in [name for name in vars(module) if name.startswith("has_triton")]:
            setattr(module, name, constant("tma" not in name and "descriptor" not in name))
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


def row_of(turns, sizes):
    """Return the tree of one conversation with user messages, reasoning and answers of these sizes."""
    user, reasoning, answer = ((n, n) for n in sizes)
    sizes = Sizes(user=user, reasoning=reasoning, answer=answer, system=5)
    return tree_of([conversation(turns, 30_000, 0, sizes)])


def kernels_of(lower):
    """Return the kernels that the code is made of at which lowering stops, or the error before."""
    try:
        lower()
    except Exception as error:  # dynamo wraps what is raised in a backend
        text = f"{type(error).__name__}: {error}"
        if "LoweredError" not in text:
            return {"error": text[:500]}
        return {"kernels": re.findall(r"async_compile\.triton\('(\w+)'", text)}
    raise AssertionError("nothing was compiled")


def finish(tree, result):
    """Print the result and end the process: its `torch.cuda` is of no further use."""
    sys.stdout.write(json.dumps({"length": tree.plan.length, **result}) + "\n")
    sys.stdout.flush()
    os._exit(0)


def forward(guard, tree, kind, size, heads, kv_heads, head_dim, softcap, sinks):
    """Lower the forward pass, by calling tree attention on fake CUDA tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    stand_in_for_the_device(guard)
    stop_at_the_generated_code()
    make_numbers_empty()
    length = tree.plan.length
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        integers = torch.empty(1, length, dtype=torch.long, device="cuda")

        def draw(num_heads):
            shape = (1, length, num_heads, head_dim)
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

        logits = torch.empty(heads, dtype=torch.bfloat16, device="cuda") if sinks else None
        inputs = AttentionInputs(draw(heads), draw(kv_heads), draw(kv_heads), 0.1, softcap, logits)
        mask = mask_of(Tree(tree.plan, integers, integers), kind, size)
        finish(tree, kernels_of(lambda: flex.flex_tree_attention(inputs, mask)))


def backward(guard, tree, kind, size, heads, kv_heads, head_dim, softcap, sinks):
    """
    Lower the backward pass: its graph is captured on the CPU, moved to fake CUDA tensors, and given to Inductor.

    Capturing it on fake CUDA tensors fails, because the autograd engine asks for the device.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def compile_backward(graph, inputs):
        finish(tree, kernels_of(lambda: lower_on_cuda(guard, graph, inputs)))

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph,
        bw_compiler=compile_backward,
        decompositions=select_decomp_table(),
    )
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True, backend=backend)
    torch_flex._validate_device = constant(None)  # which refuses to train on CPUs
    flex.compiled_flex_attention = lambda: compiled
    inputs = random_inputs(
        tree, heads=heads, kv_heads=kv_heads, head_dim=head_dim, softcap=softcap, sinks=sinks, dtype=torch.bfloat16
    )
    flex.flex_tree_attention(inputs, mask_of(tree, kind, size)).float().sum().backward()


def lower_on_cuda(guard, graph, inputs):
    """Compile a graph of the CPU as if all its tensors were on the H100."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor.compile_fx import compile_fx_inner

    stand_in_for_the_device(guard)
    stop_at_the_generated_code()
    mode = detect_fake_mode(inputs)

    def moved(x):
        if isinstance(x, tuple | list):
            return type(x)(map(moved, x))
        if not isinstance(x, torch.Tensor):
            return x
        with mode:
            return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")

    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
            if "val" in node.meta:
                node.meta["val"] = moved(node.meta["val"])
    with tracing(TracingContext(mode)):
        compile_fx_inner(graph, [moved(x) for x in inputs], is_backward=True)


def make_numbers_empty():
    """Make `torch.tensor` return a tensor without its number on a device that has no memory."""
    number = torch.tensor

    def tensor(value, *, device="cpu", **options):
        is_real = torch.device(device).type == "cpu"
        return number(value, **options) if is_real else torch.empty((), device=device, **options)

    torch.tensor = tensor


if __name__ == "__main__":
    lower = {"forward": forward, "backward": backward}[sys.argv[2]]
    for turns, sizes, *case in json.loads(sys.argv[3]):
        child = os.fork()
        if child == 0:
            lower(sys.argv[1], row_of(turns, sizes), *case)
            raise AssertionError("nothing was lowered")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
