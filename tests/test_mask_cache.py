"""Masks kept small: they come back to the bit, within the bound, and belong to whoever asked."""

import pickle

import numpy as np
import pytest

pytest.importorskip("pycocotools")
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from refer_files import ref, write_refer
from test_refer import REAL, needs_real

from aml.data import mask_cache, refer
from aml.data.mask_cache import MaskCache
from aml.data.refer import ReferDataset

masks = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1)
)


def never():
    raise AssertionError("decoded again")


@given(masks)
def test_masks_come_back_to_the_bit(mask):
    cache = MaskCache(10**6)
    np.testing.assert_array_equal(cache.get("a", mask.copy), mask)
    for _ in range(2):
        found = cache.get("a", never)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, mask)
        found[:] = 7  # the caller's own


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 5000))
def test_the_bound_holds_and_the_masks_used_last_stay(keys, limit):
    cache, order = MaskCache(limit), []
    for key in keys:
        cache.get(key, lambda: np.eye(30, dtype=np.uint8))
        order = [other for other in order if other != key] + [key]
        assert cache.size <= limit
        assert list(cache._packed) == order[len(order) - len(cache) :]
        assert cache.size == sum(map(mask_cache._size, cache._packed.values()))
    assert limit < 1000 or not keys or cache.get(keys[-1], never).sum() == 30


def test_a_copy_in_another_process_starts_empty():
    cache = MaskCache(10**6)
    cache.get("a", lambda: np.ones((4, 4), np.uint8))
    copy = pickle.loads(pickle.dumps(cache))
    assert (len(copy), copy.size, copy.limit) == (0, 0, 10**6) and len(cache) == 1
    with pytest.raises(ValueError, match="limit=-1: expected bytes, 0 or more"):
        MaskCache(-1)


def test_a_data_set_decodes_each_mask_once(tmp_path, monkeypatch):
    calls = []
    decode = refer.decode_segmentation
    monkeypatch.setattr(refer, "decode_segmentation", lambda *a: calls.append(a) or decode(*a))
    refs = [ref(0, "train", ann_id=[7, 8]), ref(1, "train", ann_id=[7]), ref(2, "train", ann_id=[7])]
    data = ReferDataset(write_refer(tmp_path, refs))
    for _ in range(3):
        for expression in data.all_expressions():
            assert data.mask(expression).sum() == 16
    assert len(calls) == 3  # two of the first ref, one of the second, none of the third
    data.masks = MaskCache(0)
    data.mask(data.all_expressions()[0])
    assert len(calls) == 5 and len(data.masks) == 0


@needs_real
def test_forty_thousand_real_masks_fit():
    data = ReferDataset(REAL)
    for expression in data.all_expressions():
        data.mask(expression)
    assert 40_000 * data.masks.size / len(data.masks) < refer.MASK_CACHE_BYTES
