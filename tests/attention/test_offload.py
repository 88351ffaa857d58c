"""Copies of offloaded caches on a stream of their own: what waits for what, and what is fetched ahead."""

import pytest
import torch

from support.lazy_streams import LazyStreams
from trl_singlepass.attention.offload import HostCopies


CPU = torch.device("cpu")


@pytest.fixture
def log():
    return []


@pytest.fixture
def copies(log):
    """Copies for a device that logs what its streams are asked for."""

    class Logged(LazyStreams):
        def wait_for(self, event):
            log.append(("wait", event))
            super().wait_for(event)

        def record_copies(self):
            log.append(("record", super().record_copies()))
            return super().record_copies()

        def protect(self, tensor):
            log.append(("protect", id(tensor)))

    return HostCopies(CPU, Logged())


def on_host(number):
    return torch.full((2, 3, 1, 4), float(number))


def test_a_copy_is_waited_for_before_it_is_used_and_protected_from_reuse(copies, log):
    copy = copies.fetch(on_host(1))
    assert log == [("record", 2), ("protect", id(copy)), ("wait", 2)]
    assert torch.equal(copy, on_host(1))


def test_a_copy_ahead_starts_early_and_is_waited_for_where_it_is_asked_for(copies, log):
    first, second, third = on_host(1), on_host(2), on_host(3)
    copies.fetch(first, ahead=second)
    assert [what for what, _ in log] == ["record", "protect", "record", "protect", "wait"]
    log.clear()
    assert torch.equal(copies.fetch(second, ahead=third), second)
    assert log[-1] == ("wait", 4)
    assert [what for what, _ in log] == ["record", "protect", "wait"]  # that of the third


def test_the_last_copy_stays_for_the_backward_of_a_recomputed_layer(copies, log):
    host = on_host(1)
    copy = copies.fetch(host)
    log.clear()
    assert copies.fetch(host) is copy
    assert log == [("wait", 2)]


def test_kinds_do_not_displace_one_another(copies, log):
    full, next_full, window = on_host(1), on_host(2), on_host(3)
    copies.fetch(full, ahead=next_full, kind="full")
    copies.fetch(window, kind="window")
    log.clear()
    copies.fetch(next_full, kind="full")
    assert [what for what, _ in log] == ["wait"]


def test_what_was_sent_is_there_before_it_is_fetched_again(copies):
    host = torch.zeros(2, 3, 1, 4)
    copies.send(on_host(5), host)
    assert torch.equal(copies.fetch_for_one_use(host), on_host(5))
    copies.send(on_host(6), host)
    copies.start_for_one_use(host)
    assert torch.equal(copies.fetch_for_one_use(host), on_host(6))
