"""
TRL's kernels of the fused head, run by Triton's interpreter on the CPU, equal PyTorch's formulas.

As a script, with `TRITON_INTERPRET=1`, it runs them and prints a JSON object: the kernels that ran, and for each case
the largest relative difference of log-probabilities, entropy, and gradients of hidden states, weight and bias.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import trl
from packaging.version import Version


pytestmark = [
    pytest.mark.slow,  # with the lowering, since it needs Triton as well
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="the kernels came with TRL 1.16"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton: `make test-slow` installs it"
    ),
]
# Dtype, softcap, scale of the logits, temperature, bias. The vocabulary's last chunk and last block are partial.
CASES = {
    "plain": (torch.float32, None, 1.0, 1.0, False),
    "bias": (torch.float32, None, 1.0, 1.0, True),
    "softcap": (torch.float32, 30.0, 1.0, 1.0, False),
    "scale and temperature": (torch.float32, None, 0.5, 0.7, True),
}
TOKENS, HIDDEN, VOCABULARY, CHUNK = 5, 16, 2500, 1100


def inputs_of(dtype, has_bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return draw(TOKENS, HIDDEN), draw(VOCABULARY, HIDDEN), draw(VOCABULARY) if has_bias else None, targets


def formulas(hidden, weight, bias, targets, temperature, softcap, scale):
    """Log-probabilities and entropy as PyTorch computes them from all logits at once."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def differences(dtype, softcap, scale, temperature, has_bias):
    """Run both ways; return the relative differences of outputs and gradients."""
    hidden, weight, bias, targets = inputs_of(dtype, has_bias)
    from trl.kernels import chunked_logprob

    ours = chunked_logprob.ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, CHUNK, softcap, scale, ("entropy",)
    )[:2]
    theirs = formulas(hidden, weight, bias, targets, temperature, softcap, scale)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    results = [
        [*(x.detach() for x in outputs), *torch.autograd.grad(outputs[0].sin().sum() + outputs[1].cos().sum(), leaves)]
        for outputs in (ours, theirs)
    ]
    return [float((one - other).abs().max() / other.abs().max()) for one, other in zip(*results, strict=True)]


def main():
    from trl.kernels import chunked_logprob

    launched = []
    for name in ("_forward_kernel", "_backward_kernel"):
        kernel = getattr(chunked_logprob, name)
        assert "Interpreted" in type(kernel).__name__, type(kernel)
        kernel.pre_run_hooks.append(lambda *args, name=name, **kwargs: launched.append(name))
    chunked_logprob._use_triton = lambda device: True  # which takes them on GPUs only
    found = {name: differences(*case) for name, case in CASES.items()}
    sys.stdout.write(json.dumps({"differences": found, "launched": sorted(set(launched))}) + "\n")


@pytest.fixture(scope="module")
def result():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_fused_head(case, result):
    assert result["launched"] == ["_backward_kernel", "_forward_kernel"]
    differences = result["differences"][case]
    assert len(differences) == (5 if CASES[case][-1] else 4)
    assert max(differences) < 1e-5, differences


if __name__ == "__main__":
    main()
