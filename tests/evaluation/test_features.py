"""Features of images: the same in any batches and on any devices, and kept in the cache."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ddpm.data import ArraySource, digits
from ddpm.errors import InputError
from ddpm.evaluation import comparison, features
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.shipped import load_classifier
from ddpm.training import sharding


def extractor(batch_size=64):
    network = features.of_classifier("digits", (8, 8, 1))
    return features.Extractor(network, sharding.data_mesh(), batch_size=batch_size)


def test_features_are_the_networks_whatever_the_batches():
    images = digits("test").image[:70]
    found = extractor(64)(images)
    model = Classifier(10)
    expected = model.apply({"params": load_classifier("digits")}, np.float32(images) / 127.5 - 1)
    np.testing.assert_allclose(found.vectors, expected.features, rtol=1e-3, atol=1e-5)
    logits = np.float64(expected.logits)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, p, rtol=1e-3, atol=1e-6)
    parts = features.of_samples(extractor(7), [images[:3], images[3:]])
    np.testing.assert_allclose(parts.vectors, found.vectors, rtol=1e-3, atol=1e-5)


def test_features_of_data_are_kept_under_what_they_depend_on(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, calls = digits("test"), []
    counted = extractor()
    whole = counted._apply
    counted._apply = lambda *x: calls.append(0) or whole(*x)
    first = features.of_source(counted, source, {"name": "digits"})
    made = len(calls)
    assert made == 6
    assert len(first.vectors) == len(source)
    again = features.of_source(counted, source, {"name": "digits"})
    assert len(calls) == made
    assert (again.vectors == first.vectors).all()
    # Another split by name, other images, or another network are others.
    features.of_source(counted, source, {"name": "other"})
    assert len(calls) == 2 * made
    other = ArraySource(source.image[::-1], None, None)
    found = features.of_source(counted, other, {"name": "digits"})
    np.testing.assert_allclose(found.vectors[::-1], first.vectors, rtol=1e-3, atol=1e-5)
    key = counted.network.key | {"sha256": "of others"}
    counted.network = counted.network._replace(key=key)
    features.of_source(counted, source, {"name": "digits"})
    assert len(calls) == 4 * made


def test_images_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"is for images of \(8, 8, 1\)"):
        features.of_classifier("digits", (8, 9, 1))


def test_comparison_tells_halves_of_digits_from_noise():
    net, image = extractor(), digits("train").image
    data, same = net(image[::2]), net(image[1::2])
    noise = net(np.random.default_rng(0).integers(0, 256, (700, 8, 8, 1)).astype(np.uint8))
    floor, found = comparison.compare(data, same), comparison.compare(data, noise)
    assert floor["frechet_distance"] < 0.2 * found["frechet_distance"]
    assert floor["kernel_distance"] < 0.2 * found["kernel_distance"]
    assert comparison.floor(data, same, 10**6) == ("held-out images", 719, floor)
    halves = comparison.floor(data, None, 300)  # disjoint: else there would be copies
    assert (halves.images, halves.of) == (300, "training images against 360 others")
    assert halves.values["frechet_distance"] < 0.2 * found["frechet_distance"]
    assert 0.4 < halves.values["two_sample_accuracy"] < 0.6
    assert floor["two_sample_accuracy"] < 0.6 < 0.95 < found["two_sample_accuracy"]
    assert floor["precision"] > 0.8 > 0.3 > found["precision"]
    assert floor["class_distance"] < 0.1 < found["class_distance"]
    labels = digits("train").label[::2]
    true = np.bincount(labels, minlength=10) / len(labels)
    np.testing.assert_allclose(comparison.shares(data), true, atol=0.01)


def test_seeds_give_mean_and_spread():
    found = comparison.spread([{"x": 1.0}, {"x": 2.0}, {"x": 6.0}])
    assert found["x"]["mean"] == 3.0
    assert found["x"]["std"] == pytest.approx(np.sqrt(7))
    assert comparison.spread([{"x": 1.0}])["x"]["std"] is None


def test_features_are_the_same_over_three_devices(tmp_path):
    """Of 7 images in batches of 4, rounded up to 6."""
    images = digits("test").image[:7]
    np.savez(tmp_path / "images.npz", images=images)
    program = f"""
import jax, numpy as np
from ddpm.evaluation import features
from ddpm.training import sharding
network = features.of_classifier("digits", (8, 8, 1))
extract = features.Extractor(network, sharding.data_mesh(), batch_size=4)
assert (jax.device_count(), extract.batch_size) == (3, 6)
found = extract(np.load({str(tmp_path / "images.npz")!r})["images"])
np.savez({str(tmp_path / "found.npz")!r}, **found._asdict())
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=3"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = extractor()(images)
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_allclose(found["vectors"], expected.vectors, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=1e-5)
