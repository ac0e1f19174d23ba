"""Trains one of the classifiers that are shipped: python -m ddpm.evaluation.train_classifier digits

By the training split alone; the accuracy on the test split is measured once, at the end.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from ddpm import backend
from ddpm.data import digits, tfds
from ddpm.data.pipeline import evaluation_batches, train_batch
from ddpm.data.sources import Source
from ddpm.diffusion.pixels import to_float
from ddpm.errors import InputError, path_error
from ddpm.evaluation.classifier import Classifier, shifted
from ddpm.evaluation.shipped import FOLDER, flat
from ddpm.files.atomic import check_writable, write_atomically

LOG_EVERY = 100


class Recipe(NamedTuple):
    """The settings that a classifier is trained with."""

    steps: int
    batch_size: int
    learning_rate: float
    most_shift: int
    flip: bool


RECIPES = {
    "digits": Recipe(1500, 128, 3e-3, 1, False),
    "fashion_mnist": Recipe(4500, 128, 3e-3, 0, True),
}


def train(source: Source, recipe: Recipe, seed: int = 0) -> Any:
    """Returns the averaged weights after recipe.steps of AdamW, its rate a cosine down to 0."""
    model = Classifier(source.num_classes or 10)
    x = jnp.zeros((1, *source.image_shape), jnp.float32)
    params = model.init(jax.random.key(seed), x)["params"]
    rate = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, 100, max(recipe.steps, 101)
    )
    optimizer = optax.adamw(rate, weight_decay=1e-2)

    def loss(params: Any, key: jax.Array, image: jax.Array, label: jax.Array) -> jax.Array:
        key_shift, key_drop = jax.random.split(key)
        x = shifted(key_shift, to_float(image), recipe.most_shift, flip=recipe.flip)
        found: Any = model.apply({"params": params}, x, train=True, rngs={"dropout": key_drop})
        target = optax.smooth_labels(jax.nn.one_hot(label, model.num_classes), 0.05)
        return optax.softmax_cross_entropy(found.logits, target).mean()

    def step(carry: Any, number: jax.Array, image: jax.Array, label: jax.Array) -> Any:
        params, average, state = carry
        key = jax.random.fold_in(jax.random.key(seed), number)
        value, gradient = jax.value_and_grad(loss)(params, key, image, label)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, jnp.maximum(0.005, 1 / (number + 1)))
        return (params, average, state), value

    step = jax.jit(step, donate_argnums=0)
    carry = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    for number in range(recipe.steps):
        batch = train_batch(source, seed, number, recipe.batch_size)
        carry, value = step(carry, np.int32(number), batch.image, batch.label)
        if (number + 1) % LOG_EVERY == 0:
            print(f"step {number + 1}/{recipe.steps}  loss {float(value):.4f}", file=sys.stderr)
    return carry[1]


def accuracy(params: Any, source: Source) -> float:
    """Returns the share of a source's images whose class is found."""
    model = Classifier(source.num_classes or 10)

    @jax.jit
    def classify(image: jax.Array) -> jax.Array:
        found: Any = model.apply({"params": params}, to_float(image))
        return found.logits

    right = 0
    for batch in evaluation_batches(source, 500):
        found = np.asarray(classify(batch.examples.image)).argmax(axis=1)
        right += int((found == batch.examples.label)[batch.mask].sum())
    return right / len(source)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ddpm.evaluation.train_classifier")
    parser.add_argument("name", help=" or ".join(sorted(RECIPES)))
    parser.add_argument("--data_dir", default=None, help="of tensorflow-datasets")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the weights")
    parser.add_argument("--steps", type=int, default=None, help="other than the recipe's")
    options = parser.parse_args(argv)
    backend.configure()
    try:
        recipe = _recipe(options)
        check_writable(options.out, f"{options.name}.safetensors")
        splits = [
            digits(split)
            if options.name == "digits"
            else tfds(options.name, split, options.data_dir)
            for split in ("train", "test")
        ]
    except (InputError, OSError) as error:
        text = path_error(error) if isinstance(error, OSError) else error
        print(f"error: {text}", file=sys.stderr)
        return 2
    params = train(splits[0], recipe)
    data = save(flat(params))
    path = options.out / f"{options.name}.safetensors"
    write_atomically(path, lambda p: p.write_bytes(data))
    print(f"test accuracy {accuracy(params, splits[1]):.4f}")
    print(f"{path}  {len(data):,} bytes  sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


def _recipe(options: argparse.Namespace) -> Recipe:
    """Returns the recipe of the options; InputError for those that cannot be, before hours are
    spent."""
    if options.name not in RECIPES:
        raise InputError(f"{options.name!r}: must be one of {', '.join(sorted(RECIPES))}")
    recipe = RECIPES[options.name]
    if options.steps is not None:
        if options.steps < 1:
            raise InputError(f"--steps={options.steps}: must be a whole number >= 1")
        if options.out == FOLDER:
            raise InputError("--steps: name another folder with --out, to keep what is shipped")
        recipe = recipe._replace(steps=options.steps)
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out={options.out}: is a file, not a folder")
    return recipe


if __name__ == "__main__":
    sys.exit(main())
