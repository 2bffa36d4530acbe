"""A fitted model knows how its features were made, and refuses others."""

import json
import re

import joblib
import numpy as np
import pytest
from conftest import MODELS
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from estimators import Head2ToeClassifier, Head2ToeClassifierCV, Head2ToeSelector
from h2t_store import extract
from h2t_store.recipe import recipe_differences, recipe_of
from h2t_store.storage.layout import ExtractionHeader, Layer

SEARCH = Head2ToeClassifierCV(alphas=(0.3,), keep_fractions=(None,), Cs=(1.0,), single_layers=0, cv=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Extracts images whose classes differ in brightness, another set of them in a store of its own for each name."""
    known = {}

    def made(name="train", **change):
        key = name, *change.items()
        if key not in known:
            rng = np.random.default_rng(len(name))
            y = np.arange(24) % (3 if name == "train" else 2)
            images = (rng.integers(0, 120, (24, 8, 8, 3)) + 60 * y[:, None, None, None]).astype(np.uint8)
            settings = dict(model=f"{MODELS}:small_input", target_size=8, workers=0, batch_size=24) | change
            store = tmp_path_factory.mktemp(name) / "s.zarr"
            known[key] = extract((images, np.array(["ant", "bee", "cow"])[y]), store=store, name=name, **settings)
        return known[key]

    return made


@pytest.fixture(
    scope="module", params=[Head2ToeClassifier(), SEARCH, Head2ToeSelector()], ids=lambda e: type(e).__name__
)
def model(request, made):
    return clone(request.param).fit(made(), made().y)


def answers(model):
    names = ("predict", "predict_proba", "predict_log_proba", "decision_function", "transform")
    return [getattr(model, name) for name in names if hasattr(model, name)]


def questions(model):
    return [*answers(model), lambda X: model.score(X, X.y)] if hasattr(model, "score") else answers(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"img_size": 12}, "input size 8 there, 12 here"),
        ({"seed": 3}, r"small_input \(weights \w{8}: its factory\) there, .* \(weights \w{8}: its factory\) here"),
        ({"target_size": 64}, "target size 8 there, 64 here"),
        ({"taps": "blocks"}, "layers with .* there, without here"),
    ],
)
def test_features_of_another_recipe_are_refused(model, made, change, said):
    other = made("test", **change)
    for ask in questions(model):
        with pytest.raises(ValueError, match=said) as caught:
            ask(other)
        assert str(caught.value).startswith("X holds features made in another way than those Head2Toe")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{}, {"dtype": "float32"}, {"amp": True}, {"batch_size": 5}])
@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_other_images_classes_and_number_formats_are_welcome(model, made, change):
    other = made("test", **change)
    for ask in answers(model):
        answer, expected = ask(other), ask(np.asarray(other))
        assert (answer == expected).all() if answer.dtype.kind == "U" else np.allclose(answer, expected)
    if hasattr(model, "score"):
        assert model.score(other, other.y) == np.mean(model.predict(other) == other.y)


def test_arrays_have_no_recipe(model, made):
    ask = questions(model)[0]
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        ask(np.asarray(made()))
    assert model.recipe_ == made().recipe
    dense = clone(model).fit(np.asarray(made()), made().y)
    assert dense.recipe_ is None
    questions(dense)[0](made(img_size=12))
    again = clone(model).fit(made(), made().y).fit(np.asarray(made()), made().y)
    assert again.recipe_ is None


def test_the_recipe_goes_where_the_model_goes(made, tmp_path):
    X, other = made(), made("test", img_size=12)
    search = GridSearchCV(Head2ToeClassifier(), {"alpha": [0.3]}, cv=2, error_score="raise").fit(X, X.y)
    pipeline = make_pipeline("passthrough", Head2ToeClassifier()).fit(X, X.y)
    joblib.dump(Head2ToeClassifier().fit(X, X.y), tmp_path / "model")
    mixture = clone(SEARCH).fit(X, X.y)
    for model in (search, pipeline, joblib.load(tmp_path / "model"), mixture.best_estimator_, *mixture.estimators_):
        assert model.score(X, X.y) > 0.5
        with pytest.raises(ValueError, match="input size 8 there, 12 here"):
            model.score(other, other.y)


def test_a_selection_has_the_recipe_of_its_columns(made):
    X, test = made(), made("test")
    names = [layer.name for layer in X.layers]
    assert list(X.recipe["layers"]) == names
    assert list(X[3:5, [X.layers[2].start, X.layers[0].start, X.layers[2].start]].recipe["layers"]) == [
        names[0],
        names[2],
    ]
    assert X[:, []].recipe["layers"] == {}
    model = Head2ToeClassifier().fit(X.select_layers("layers.1*"), X.y)
    assert model.score(test.select_layers("layers.1*"), test.y) >= 0
    with pytest.raises(ValueError, match=r"layers without there, with 'layers.0.conv1:in', .* and \d more here"):
        model.predict(test)
    # Only the layers that are used have to agree: the last ones are pooled alike for both sizes.
    wide = made("test", target_size=64).select_layers("head")
    assert Head2ToeClassifier().fit(X.select_layers("head"), X.y).predict(wide).shape == (24,)


def test_a_recipe_is_plain_and_tells_nothing_of_data_or_place(made):
    recipe = made().recipe
    assert json.loads(json.dumps(recipe)) == recipe
    assert made("test").recipe == recipe
    assert not re.search("/|array|bee|test", json.dumps(recipe))
    recipe["layers"].clear()
    recipe["preprocessing"].clear()
    assert made().recipe == made("test").recipe != recipe


def recipe(inputs, layers, **arguments):
    header = ExtractionHeader(3, 3, "float16", (), layers, {"inputs": inputs, "environment": {"arguments": arguments}})
    return recipe_of(header, layers)


TOKENS = (Layer("blocks.0", 0, 8, (8, 5), (8,)), Layer("head", 8, 13, (5,), (8,)))


def test_what_a_store_does_not_say_is_not_compared():
    old = recipe({"preprocessing": {"input_size": [3, 8, 8]}, "weights_sha256": "a" * 64}, TOKENS)
    exif = recipe({"preprocessing": {"input_size": [3, 8, 8], "orientation": "exif", "rule": 1}}, TOKENS)
    assert recipe_differences(old, exif) == ["orientation ignored there, exif here"]
    assert recipe_differences(recipe({}, TOKENS), exif) == []
    assert recipe_differences(exif, recipe({}, TOKENS)) == []


def test_sizes_are_as_people_write_them():
    square, wide = (recipe({"preprocessing": {"input_size": [3, 8, width]}}, TOKENS) for width in (8, 9))
    assert recipe_differences(square, wide) == ["input size 8 there, 8 x 9 here"]


def test_a_class_token_matters_where_there_are_tokens():
    pooled, kept = (recipe({"cls_token": policy}, TOKENS) for policy in ("pool", "keep"))
    assert recipe_differences(pooled, kept) == ["class token 'pool' there, 'keep' here"]
    maps = (Layer("stem", 0, 8, (8, 5, 5), (8,)),)
    assert recipe_differences(recipe({"cls_token": "pool"}, maps), recipe({"cls_token": "keep"}, maps)) == []


def test_widths_and_shapes_tell_pooling_apart():
    one, two = (
        recipe({}, (Layer("stem", 0, width, shape, (16,)),)) for width, shape in ((8, (8, 5, 5)), (32, (8, 6, 6)))
    )
    assert recipe_differences(one, two) == [
        "number of features of stem 8 there, 32 here",
        "shape of stem [8, 5, 5] there, [8, 6, 6] here",
    ]


@pytest.mark.parametrize(
    ("arguments", "origin"),
    [
        ({"model": "vit", "pretrained": True}, "pretrained"),
        ({"model": "vit", "pretrained": False, "seed": 3}, "random, seed 3"),
        ({"model": "vit", "pretrained": True, "checkpoint": "/home/me/w.pt"}, "a checkpoint"),
        ({"model": "net.py:make"}, "its factory"),
        ({"model": None}, "a module in memory"),
    ],
)
def test_networks_are_told_apart_by_their_weights_and_named_by_where_those_come_from(arguments, origin):
    there = recipe({"model": "vit", "weights_sha256": "a" * 64}, TOKENS)
    here = recipe({"model": "vit", "weights_sha256": "b" * 64}, TOKENS, **arguments)
    assert recipe_differences(there, here) == [
        f"network vit (weights aaaaaaaa) there, vit (weights bbbbbbbb: {origin}) here"
    ]
    named = recipe({"model": "other", "weights_sha256": "a" * 64}, TOKENS, **arguments)
    assert recipe_differences(there, named) == []
