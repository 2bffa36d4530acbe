"""Scaling by layer and by feature."""

import numpy as np
import pytest
from _estimator_data import FakeFeatures, make_problem

from estimators.head import KeptFeatures
from estimators.layers import layer_index
from estimators.scaling import inverse_layer_norms


def scale_layers(X, widths):
    """Each layer's vector of a row divided by its length, written out."""
    parts = np.split(X.astype(np.float64), np.cumsum(widths)[:-1], axis=1)
    lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    return np.hstack([part / np.where(length > 0, length, 1) for part, length in zip(parts, lengths, strict=True)])


@pytest.mark.parametrize("max_bytes", [0, np.inf])
@pytest.mark.parametrize("scattered", [False, True])
def test_layers_are_scaled_to_unit_length_and_zero_stays_zero(scattered, max_bytes):
    X, _, _ = make_problem(0)
    X[3, 4:6] = 0
    features = FakeFeatures(X, (4, 2, 4), scattered=scattered)
    layers = layer_index(features)
    scaled = KeptFeatures(features, np.arange(10), layers, "whole", max_bytes)
    filled = np.full(X.shape, np.nan, dtype=np.float32)
    for columns, block in scaled.column_blocks(10**6):
        assert block.dtype == np.float32
        filled[:, columns] = block
    np.testing.assert_allclose(filled, scale_layers(X, (4, 2, 4)), rtol=1e-5)
    assert (filled[3, 4:6] == 0).all()


def test_a_plain_array_is_one_layer_and_keeps_its_precision():
    X, _, _ = make_problem(1)
    scaled = KeptFeatures(X, np.arange(10), layer_index(X), "whole")
    filled = np.hstack([block for _, block in scaled.column_blocks(320 * 3)])
    assert filled.dtype == np.float64
    np.testing.assert_allclose(filled, X / np.linalg.norm(X, axis=1, keepdims=True), rtol=1e-12)


def test_norms_of_an_array_cut_like_a_feature_matrix_are_its_norms():
    X, _, _ = make_problem(2)
    X = X.astype(np.float32)
    features = FakeFeatures(X, (4, 2, 4))
    layers = layer_index(features)
    assert layers.tolist() == [0] * 4 + [1] * 2 + [2] * 4
    np.testing.assert_allclose(inverse_layer_norms(X, layers), inverse_layer_norms(features, layers), rtol=1e-6)


def test_stored_norms_are_used_without_reading_features():
    features = FakeFeatures(make_problem(3)[0], (4, 6))
    inverse_layer_norms(features, layer_index(features))
    assert features.columns_read == set()


def test_kept_parts_are_scaled_by_themselves():
    X, _, _ = make_problem(4)
    kept = np.array([0, 3, 5, 8, 9])
    X[3, [0, 3]] = 0
    scaled = KeptFeatures(X, kept, np.repeat([0, 1, 2], [4, 2, 4]), "kept")
    (_, block), *_ = scaled.column_blocks()
    np.testing.assert_allclose(block, scale_layers(X[:, kept], (2, 1, 2)), rtol=1e-12)


def test_layers_with_gaps_are_refused():
    features = FakeFeatures(make_problem(6)[0], (4, 6))
    features.layers = features.layers[1:]
    with pytest.raises(ValueError, match="without gaps"):
        layer_index(features)
