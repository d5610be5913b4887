"""Memory is handed out again when nothing holds it, and never before."""

from __future__ import annotations

import sys
from threading import Thread
from time import sleep

import torch

from mhc_compile.kernels.cpp.memory import PATIENCE, SMALLEST, Pool

LARGE = (SMALLEST // 4 + 8,)


def test_a_block_comes_back_when_its_last_holder_is_gone() -> None:
    pool = Pool()
    first = pool.empty(LARGE, torch.float32)
    address = first.data_ptr()
    view = first[3:]
    del first
    second = pool.empty(LARGE, torch.float32)
    assert second.data_ptr() != address  # the view still holds it
    del view
    third = pool.empty(LARGE, torch.float32)
    assert third.data_ptr() == address
    assert third.shape == LARGE


def test_a_block_that_a_backward_will_read_is_not_handed_out() -> None:
    pool = Pool()
    held = pool.empty(LARGE, torch.float32).fill_(3.0).requires_grad_()
    loss = held.square().sum()
    address = held.data_ptr()
    leaf = held
    del held
    assert pool.empty(LARGE, torch.float32).data_ptr() != address
    loss.backward()
    assert (leaf.grad == 6).all()


def test_small_tensors_and_other_sizes_are_their_own() -> None:
    pool = Pool()
    small = pool.empty((4,), torch.float32)
    assert not pool._blocks
    large = pool.empty(LARGE, torch.bfloat16)
    assert large.dtype == torch.bfloat16
    assert small.data_ptr() != large.data_ptr()


def test_blocks_not_asked_for_are_given_back() -> None:
    pool = Pool()
    pool.empty(LARGE, torch.float32)
    other = (LARGE[0] * 2,)
    for _ in range(2 * PATIENCE):
        pool.empty(other, torch.float32)
    assert len(pool._blocks) == 1


def test_threads_never_share_a_block() -> None:
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for _ in range(500):
            mine = pool.empty(LARGE, torch.float32)
            mine[:8] = number
            sleep(0)  # lets the others in
            if not (mine[:8] == number).all():
                wrong.append(number)

    threads = [Thread(target=work, args=(i,)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
