"""Blocks in a scan: the same as in a loop, each with its own parameters and random numbers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm.models.scan import over_blocks


class Toy(nn.Module):
    """Dense layers, of which the third has another input, and dropout between them."""

    scan: bool
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[Any]]:
        def block(h, x, name):
            width = 5 if name == "block_2" else 3
            h = nn.Dense(3, name=name)(jnp.resize(h, width)) + x
            return h, nn.Dropout(self.rate, deterministic=False, name=f"{name}_drop")(jnp.ones(64))

        names = [f"block_{i}" for i in range(6)]
        return over_blocks(self, block, names, x, list(jnp.arange(6.0)), scan=self.scan)


def test_a_scan_is_the_loop():
    x, rngs = jnp.ones(3), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = Toy(False).init(rngs, x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, Toy(True).init(rngs, x)))
    loop, scan = (Toy(s).apply(params, x, rngs=rngs) for s in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loop, scan)
    text = jax.jit(Toy(True).apply).lower(params, x, rngs=rngs).as_text()
    assert text.count("stablehlo.while") == 2  # blocks 0 and 1; 3 to 5


def test_each_block_draws_its_own_dropout():
    x, rngs = jnp.ones(3), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = Toy(False).init(rngs, x)
    masks = [tuple(np.asarray(y)) for y in Toy(True, 0.5).apply(params, x, rngs=rngs)[1]]
    assert len(set(masks)) == 6
