"""The optimiser: Adam or AdamW with a linear warm-up and a clipped gradient."""

from typing import Any

import jax
import optax

from ddpm.training.objectives import LEARNED_SCHEDULE, OFFSET


def adam(
    learning_rate: float,
    *,
    warmup_steps: int = 0,
    grad_clip: float = 0.0,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    moments_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Returns Adam (0.9, b2, 1e-8) with a linear warm-up from 0 and the gradient's norm clipped.

    With `weight_decay`, AdamW: every step takes this part, times the learning rate, off the
    network's weights, but not off biases (as Kingma et al. 2021), a learned schedule or an energy's
    offset.
    `moments_dtype` is of the first moment; the second is float32, for its decay is too slow for
    fewer bits.
    (The authors clip each replica's gradient and then average; with one replica it is the same.)
    """
    # A schedule also without warm-up keeps the optimiser's state of one structure.
    rate = (
        optax.linear_schedule(0.0, learning_rate, warmup_steps)
        if warmup_steps
        else optax.constant_schedule(learning_rate)
    )
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    if not weight_decay:  # not AdamW with 0, whose state, and so checkpoints, are of another shape
        return optax.chain(clip, optax.adam(rate, b2=b2, mu_dtype=moments_dtype))

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: (
                path[0].key not in (LEARNED_SCHEDULE, OFFSET) and path[-1].key != "bias"
            ),
            params,
        )

    return optax.chain(
        clip,
        optax.adamw(rate, b2=b2, mu_dtype=moments_dtype, weight_decay=weight_decay, mask=decays),
    )
