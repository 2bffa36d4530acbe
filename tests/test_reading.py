"""X by blocks of columns: read ahead in a thread that ends with whoever reads, through two buffers of a card."""

import threading
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from _estimator_data import FakeFeatures
from pretended_cuda import pretended_cuda

from estimators.group_lasso.reading import BlockReader, ahead


class Source:
    """Items, and what became of the generator that gives them."""

    def __init__(self, n=5, error_at=None):
        self.n, self.error_at, self.made, self.threads, self.closed = n, error_at, 0, set(), False

    def items(self):
        try:
            for item in range(self.n):
                self.threads.add(threading.current_thread())
                if item == self.error_at:
                    raise OSError("disk gone")
                self.made += 1
                yield item
        finally:
            self.closed = True


def test_items_are_made_one_ahead_in_a_thread():
    source, before = Source(), threading.enumerate()
    coming = ahead(source.items())
    assert next(coming) == 0
    assert list(coming) == [1, 2, 3, 4]
    assert source.threads.isdisjoint(before)
    assert source.closed
    assert threading.enumerate() == before


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_who_stops_reading_stops_the_thread(taken):
    source, before = Source(n=100), threading.enumerate()
    with closing(ahead(source.items())) as coming:
        for item in coming if taken else ():
            if item == taken:
                break
    assert threading.enumerate() == before
    assert source.made <= taken + 2
    assert source.closed or not source.made


@pytest.mark.parametrize("error_at", [0, 1, 4])
def test_an_error_comes_after_the_items_before_it(error_at):
    source, before, got = Source(error_at=error_at), threading.enumerate(), []
    with pytest.raises(OSError, match="disk gone"):
        got.extend(item for item in iter(ahead(source.items())))
    assert threading.enumerate() == before
    assert source.closed


def test_an_error_of_the_reader_of_blocks_stops_the_thread():
    source, before = Source(n=100), threading.enumerate()

    def read():
        for item in ahead(source.items()):
            if item == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    assert threading.enumerate() == before
    assert source.closed
    assert source.made <= 4


def test_reading_sets_no_filter_of_warnings(monkeypatch):
    """Filters are for the whole process; threads that set them at once leave them changed."""
    X = np.arange(12.0).reshape(3, 4)
    X.flags.writeable = False
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_, **__: pytest.fail("a filter was set"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (block,) = [block for _, block in BlockReader(X, torch.arange(3), 2**20, torch.device("cpu")).where_stored()]
    np.testing.assert_array_equal(block, X)
    assert block.data_ptr() == X.ctypes.data


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [1, 3]])
def test_blocks_on_a_card_are_those_of_x_and_are_gone_with_the_next(rows):
    X = np.arange(60, dtype=np.float32).reshape(5, 12)
    features = FakeFeatures(X, (2, 6, 1, 3))
    with pretended_cuda() as gpu:
        reader = BlockReader(features, torch.tensor(rows), 2**20, torch.device("cuda"))
        for _ in range(2):
            blocks = [(index, block.cpu()) for index, block in reader.on_device()]
            for index, block in blocks:
                np.testing.assert_array_equal(block, X[rows][:, index])
        assert len(blocks) == 4
        assert gpu.pinned_bytes <= 4 * len(rows) * (2 + 3 + 6)
        assert [index for index, _ in reader.on_device()] == [index for index, _ in features.column_blocks(1)]


def test_a_pass_that_is_given_up_does_not_spoil_the_next():
    X = np.arange(60, dtype=np.float32).reshape(5, 12)
    features, before = FakeFeatures(X, (2, 6, 1, 3)), threading.enumerate()
    with pretended_cuda():
        reader = BlockReader(features, torch.arange(5), 2**20, torch.device("cuda"))
        for stop in range(4):
            with closing(reader.on_device()) as blocks:
                total = sum(float(block.sum()) for _, (_, block) in zip(range(stop), blocks, strict=False))
            assert total == X[:, : [0, 2, 8, 9][stop]].sum()
            assert threading.enumerate() == before
        assert sum(float(block.sum()) for _, block in reader.on_device()) == X.sum()
