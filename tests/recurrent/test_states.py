"""States at forks: a convolution that goes on from them sees what one run over the whole path sees."""

import torch

from trl_singlepass.recurrent.states import ForkStates


def test_inputs_of_a_convolution_go_on_after_those_of_the_source():
    x = torch.arange(6.0).reshape(1, 1, 6)
    first = ForkStates()
    assert first.update_conv_state(x[..., :2], 0, conv_kernel_size=3).flatten().tolist() == [0.0, 0.0, 1.0]
    second = ForkStates([first])
    assert second.update_conv_state(x[..., 2:], 0, conv_kernel_size=3).flatten().tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert second.final["conv", 0].flatten().tolist() == [3.0, 4.0, 5.0]


def test_pieces_of_a_batch_start_from_their_own_sources():
    sources = [ForkStates(), ForkStates()]
    for index, source in enumerate(sources):
        source.update_recurrent_state(torch.full((1, 2), float(index), requires_grad=True), 0)
    batch = ForkStates(sources)
    assert batch.get_recurrent_state(0).tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert batch.get_recurrent_state(0).requires_grad
    assert batch.get_conv_state(0) is None
