"""Real data and published weights, where they lie beside the checkout."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform
from tiny_models import CifarResNet, resnet56

from estimators import Head2ToeClassifier
from h2t_store import extract
from h2t_store.network import load_backbone

SHARED = Path(__file__).parents[2] / "shared" / "data"
WEIGHTS = SHARED / "weights" / "resnet56_cifar10.safetensors"


def pooled(activation: torch.Tensor) -> torch.Tensor:
    window = activation.shape[3] // math.isqrt(512 // activation.shape[1])
    return F.avg_pool2d(activation, window).flatten(1)


@torch.no_grad()
def published_features(model: CifarResNet, images: np.ndarray) -> np.ndarray:
    """Stem, both ReLUs of each block and logits, pooled with target size 512, without hooks."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    x = F.relu(model.bn1(model.conv1(x)))
    features = [pooled(x)]
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            features.append(pooled(F.relu(block.bn1(block.conv1(x)))))
            x = block(x)
            features.append(pooled(x))
    features.append(model.linear(x.mean((2, 3))))
    return torch.cat(features, 1).numpy()


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the published weights in ../shared/data")
def test_the_published_resnet_56_gives_the_published_features(tmp_path):
    suite = np.load(SHARED / "suite" / "sign_digits.npz")
    images, labels = suite["X_train"][:40], suite["y_train"][:40]
    matrix = extract(
        (images, labels),
        model=f"{Path(__file__).with_name('tiny_models.py')}:resnet56",
        checkpoint=WEIGHTS,
        store=tmp_path / "s",
        name="x",
        img_size=32,
        taps="layer?.*.conv?:in,layer3.8,linear",
    )
    model = resnet56().eval()
    model.load_state_dict(load_file(WEIGHTS), strict=False)
    expected = published_features(model, images)
    assert matrix.shape == expected.shape == (40, 21_434)
    error = np.linalg.norm(np.asarray(matrix) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-3


@pytest.mark.skipif(not SHARED.exists(), reason="needs the images in ../shared/data")
def test_the_bundled_network_classifies_cifar_10():
    suite = np.load(SHARED / "suite" / "cifar10.npz")
    backbone = load_backbone("h2t_resnet20")
    transform = create_transform(**backbone.data_config, is_training=False)
    images = torch.stack([transform(Image.fromarray(image)) for image in suite["X_test"]])
    with torch.inference_mode():
        predicted = torch.cat([backbone.model(batch) for batch in images.split(250)]).argmax(1)
    assert (predicted.numpy() == suite["y_test"]).mean() >= 0.88


@pytest.mark.skipif(not SHARED.exists(), reason="needs the images in ../shared/data")
def test_head2toe_beats_the_last_layer_on_photographs_of_signs(tmp_path):
    X, X_test = (
        extract(SHARED / "sign_digits" / split, model="h2t_resnet20", store=tmp_path / "s", name=f"sign/{split}")
        for split in ("train", "test")
    )
    accuracy = Head2ToeClassifier().fit(X, X.y).score(X_test, X_test.y)
    last, last_test = X.select_layers("global_pool*"), X_test.select_layers("global_pool*")
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)).fit(np.asarray(last), X.y)
        for C in (0.01, 0.1, 1.0)
    ]
    assert accuracy >= 0.93
    assert accuracy >= max(probe.score(np.asarray(last_test), X_test.y) for probe in probes) + 0.05
