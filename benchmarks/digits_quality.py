"""Are the samples of the digits run recognisable? Prints a table.

    python benchmarks/digits_quality.py runs/digits/samples/NAME.npz

A classifier is trained on one half of the 1797 real digits and asked for its probabilities on the
other half and on the samples. The share given a class with probability > 0.9 is compared, and the
samples are counted by class. Two classifiers, five random halves each. Needs scikit-learn.
"""

import sys
from importlib.metadata import version

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SPLITS = 5
CLASSIFIERS = {
    "multi-layer perceptron": lambda seed: MLPClassifier((128,), max_iter=400, random_state=seed),
    "logistic regression": lambda seed: make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed)
    ),
}


def sure(classifier, images: np.ndarray) -> float:
    """Returns the share of images given a class with probability above 0.9."""
    return float((classifier.predict_proba(images).max(axis=1) > 0.9).mean())


def main(path: str) -> None:
    """Prints the table for an .npz of samples."""
    with np.load(path) as file:
        samples = file["images"].reshape(-1, 64) * (16 / 255)
    real, labels = load_digits(return_X_y=True)
    print(f"{len(samples)} samples, scikit-learn {version('scikit-learn')}")
    print("classifier | accuracy | sure of real | sure of samples | ratio (spread) | least class")
    for name, make in CLASSIFIERS.items():
        rows = []
        for seed in range(SPLITS):
            order = np.random.default_rng(seed).permutation(len(real))
            one, other = order[::2], order[1::2]
            classifier = make(seed).fit(real[one], labels[one])
            real_sure, sample_sure = sure(classifier, real[other]), sure(classifier, samples)
            counts = np.bincount(classifier.predict(samples), minlength=10)
            accuracy = classifier.score(real[other], labels[other])
            rows.append((accuracy, real_sure, sample_sure, sample_sure / real_sure, counts.min()))
        table = np.array(rows)
        accuracy, real_sure, sample_sure, ratio, _ = table.mean(axis=0)
        print(
            f"{name} | {accuracy:.3f} | {real_sure:.3f} | {sample_sure:.3f} | "
            f"{ratio:.3f} ({table[:, 3].min():.3f}-{table[:, 3].max():.3f}) | "
            f"{int(table[:, 4].min())} of {len(samples)}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
