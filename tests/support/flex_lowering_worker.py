"""
Lower FlexAttention for a GPU that is not there: `python -m support.flex_lowering_worker GUARD CARD DIRECTION CASES`.

`GUARD` is `cuda_guard.cpp` as a shared object, `CARD` a name of `absent_gpu.CARDS`, `DIRECTION` is forward or
backward, and `CASES` a JSON list of `[turns, sizes, kind, size, heads, kv_heads, head_dim, softcap, sinks]`. For each
case, prints a JSON line with the length of the row and the names of the Triton kernels that Inductor made of the
package's own code, or the error. With a folder as a fifth argument, compiles them to machine code there, and adds what
came out of it.
"""

import json
import sys
import warnings

import torch
from torch.nn.attention import flex_attention as torch_flex

from support.absent_gpu import CARDS, TRITON_KERNEL, code_of, compile_kernels, constant, stand_in_for
from support.gpu_stand_in import gpu
from support.tree_masks import mask_of, random_inputs, tree_of
from trl_singlepass.attention import Tree, flex
from trl_singlepass.attention.interface import AttentionInputs
from trl_singlepass.attention.kernel_choice import DeviceTraits
from trl_singlepass.reference.timing import Sizes, conversation


def row_of(turns, sizes):
    """Return the tree of one conversation with user messages, reasoning and answers of these sizes."""
    user, reasoning, answer = ((n, n) for n in sizes)
    sizes = Sizes(user=user, reasoning=reasoning, answer=answer, system=5)
    return tree_of([conversation(turns, 30_000, 0, sizes)])


def prepare_forward(tree, kind, size, heads, kv_heads, head_dim, softcap, sinks):
    """Return a function that computes attention of fake CUDA tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def draw(num_heads):
        shape = (1, tree.plan.length, num_heads, head_dim)
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    def lower():
        forget_compiled()
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            integers = torch.empty(1, tree.plan.length, dtype=torch.long, device="cuda")
            logits = torch.empty(heads, dtype=torch.bfloat16, device="cuda") if sinks else None
            inputs = AttentionInputs(draw(heads), draw(kv_heads), draw(kv_heads), 0.1, softcap, logits)
            flex.flex_tree_attention(inputs, mask_of(Tree(tree.plan, integers, integers), kind, size))

    return lower


def prepare_backward(tree, kind, size, heads, kv_heads, head_dim, softcap, sinks):
    """
    Capture the graph of the backward pass on the CPU; return a function that lowers it on fake CUDA tensors.

    Capturing it on fake CUDA tensors fails, because the autograd engine asks for the device.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    captured = []

    def capture(graph, inputs):
        captured.append((graph, inputs))
        return graph

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph, bw_compiler=capture, decompositions=select_decomp_table()
    )
    forget_compiled()
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True, backend=backend)
    flex.compiled_flex_attention, get_compiled = constant(compiled), flex.compiled_flex_attention
    inputs = random_inputs(
        tree, heads=heads, kv_heads=kv_heads, head_dim=head_dim, softcap=softcap, sinks=sinks, dtype=torch.bfloat16
    )
    flex.flex_tree_attention(inputs, mask_of(tree, kind, size))
    flex.compiled_flex_attention = get_compiled
    ((graph, fake_inputs),) = captured
    return lambda: lower_on_cuda(graph, fake_inputs)


def forget_compiled():
    torch._dynamo.reset()
    flex.compiled_flex_attention.cache_clear()
    flex._score_mod.cache_clear()


def lower_on_cuda(graph, inputs):
    """Compile a graph of the CPU as if all its tensors were on the GPU."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor.compile_fx import compile_fx_inner

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


def outcome_of(lower, folder):
    """Return the kernels that a function lowers to; with a folder, compiled there."""
    try:
        code = code_of(lower)
        kernels = [name for name, _ in TRITON_KERNEL.findall(code)]
        return {"kernels": kernels, **({"compiled": list(compile_kernels(code, folder))} if folder else {})}
    except Exception as error:  # the test says which case it is
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main(guard, card, direction, cases, folder=None):
    """Lower every case, and print a line for each."""
    warnings.simplefilter("ignore")
    traits = gpu(CARDS[card].major, CARDS[card].minor)
    DeviceTraits.from_device, flex._WITHOUT_BACKWARD = constant(traits), ()  # also where the CPU stands in for it
    prepare = {"forward": prepare_forward, "backward": prepare_backward}[direction]
    torch_flex._validate_device = constant(None)  # which refuses to train on CPUs
    rows = [row_of(turns, sizes) for turns, sizes, *_ in cases]
    prepared = [prepare(row, *case) for row, (_, _, *case) in zip(rows, cases, strict=True)]
    stand_in_for(CARDS[card], guard)
    make_numbers_empty()
    for row, lower in zip(rows, prepared, strict=True):
        sys.stdout.write(json.dumps({"length": row.plan.length, **outcome_of(lower, folder)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]), *sys.argv[5:])
