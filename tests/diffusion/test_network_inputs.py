"""Self-conditioning by hand-made networks and the exact denoiser; small images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import Prediction, ancestral, ddim, dpm_solver, heun, losses, predictor_corrector, sample
from ddpm.diffusion import network_inputs
from ddpm.diffusion.network_inputs import Conditioning, SelfConditioned, self_conditioned_by
from ddpm.diffusion.predictions import from_x_0
from ddpm.sampling.sample import sample_chain
from ddpm.sampling.self_conditioning import self_conditioning
from tests.exact import close, gaussian_denoiser, pair

SHAPE = (4, 3)
RNG = np.random.default_rng(0)


def affine(schedule, a, b, c, calls=None):
    """A network of x_0 = a x_t + b guess + c x_t guess, by its guess."""

    def from_estimate(guess):
        def denoise(x_t, t):
            if calls is not None:
                calls.append(guess)
            return from_x_0(schedule, x_t, t, a * x_t + b * guess + c * x_t * guess)

        return denoise

    return from_estimate


def test_the_coin_says_who_is_given_the_first_prediction():
    schedule, _ = pair("linear", 20)
    x_t, t = np.float32(RNG.normal(size=SHAPE)), np.array([1, 5, 10, 20])
    coins = np.array([True, False, True, False])
    found = jax.jit(self_conditioned_by(affine(schedule, 0.5, 0.3, 0.0), coins))(x_t, t).x_0
    close(found, np.where(coins[:, None], 0.65, 0.5) * x_t, rtol=1e-6)
    both = jax.jit(SelfConditioned(affine(schedule, 0.5, 0.3, 0.0)))(x_t, t).x_0
    close(both, 0.65 * x_t, rtol=1e-6)


def test_no_gradient_reaches_the_first_call_in_training():
    """d/da (a + b a_0) x: of the second call alone, a_0 the same number held fixed."""
    schedule, _ = pair("linear", 20)
    x_0, eps = (np.float32(RNG.normal(size=SHAPE)) for _ in range(2))
    t = np.array([3, 5, 10, 20])

    def loss(a, first, coins):
        x_t = conditional_x_t(schedule, x_0, t, eps)
        guess = first * x_t if coins else jnp.zeros_like(x_t)
        denoise = lambda *_: affine(schedule, a, 0.3, 0.0)(guess)(x_t, t)  # noqa: E731
        return losses.simple(schedule, denoise, x_0, t, eps).mean()

    def trained(a, coins):
        denoise = self_conditioned_by(affine(schedule, a, 0.3, 0.0), jnp.full(4, coins))
        return losses.simple(schedule, denoise, x_0, t, eps).mean()

    for coins in (True, False):
        found = jax.jit(jax.value_and_grad(trained), static_argnums=1)(0.5, coins)
        expected = jax.jit(jax.value_and_grad(loss), static_argnums=2)(0.5, 0.5, coins)
        close(found, expected, rtol=1e-5)
    through = jax.grad(lambda a: loss(a, a, True))(0.5)
    assert abs(float(through) / float(jax.grad(trained)(0.5, True)) - 1) > 0.05


def conditional_x_t(schedule, x_0, t, eps):
    level = schedule.at(t)
    return level.alpha[:, None] * x_0 + level.sigma[:, None] * eps


def test_evaluated_it_is_differentiated_through_both_calls():
    """As the divergence in a flow needs: against the derivative of a x + b (a x) + c x (a x)."""
    schedule, _ = pair("linear", 20)
    x_t, t = np.float32(RNG.normal(size=(1, 3))), jnp.array([5])
    denoise = SelfConditioned(affine(schedule, 0.5, 0.3, 0.2))
    found = jax.jit(jax.jacobian(lambda x: denoise(x, t).x_0[0]))(x_t)[:, 0]
    close(found, np.diag(0.65 + 0.2 * x_t[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sampler", [ancestral(), ddim(steps=7), dpm_solver(order=2, steps=7), heun(steps=7),
                predictor_corrector(ddim(steps=7))],
    ids=["ancestral", "ddim", "dpm_solver", "heun", "corrected"],
)  # fmt: skip
def test_samples_of_a_network_that_ignores_its_guess_are_the_plain_ones(sampler):
    schedule, exact = pair("linear", 20)
    plain = gaussian_denoiser(exact, 0.3, 0.04)
    denoise = SelfConditioned(lambda guess: plain)
    draw = lambda d, s: jax.jit(  # noqa: E731
        lambda key: sample(key, schedule, d, SHAPE, sampler=s)
    )(jax.random.key(0))
    assert (draw(denoise, self_conditioning(sampler)) == draw(plain, sampler)).all()


def test_each_step_is_given_what_the_last_one_predicted_and_calls_once():
    schedule, _ = pair("linear", 6)
    calls = []

    def from_estimate(guess):
        def denoise(x_t, t):
            calls.append(guess)
            return from_x_0(schedule, x_t, t, guess + 0.1)  # counts the steps

        return denoise

    draw = jax.jit(
        lambda key: sample_chain(
            key,
            schedule,
            SelfConditioned(from_estimate),
            SHAPE,
            sampler=self_conditioning(ancestral()),
            snapshots=6,
        )
    )
    chain = draw(jax.random.key(0))
    steps = np.broadcast_to(0.1 * np.arange(1, 7)[:, None, None], (6, *SHAPE))
    close(chain.predicted_x_0, steps, rtol=1e-5)
    assert int(chain.evaluations) == 6
    once = len(calls)  # traced: one call in the loop's body
    jax.make_jaxpr(SelfConditioned(from_estimate))(jnp.zeros(SHAPE), jnp.ones(4, int))
    assert (once, len(calls) - once) == (1, 2)


def test_another_denoiser_is_refused():
    schedule, exact = pair("linear", 6)
    with pytest.raises(TypeError, match="is for a SelfConditioned denoiser"):
        sample(jax.random.key(0), schedule, gaussian_denoiser(exact), SHAPE,
               sampler=self_conditioning(ancestral()))  # fmt: skip


def test_arguments_of_the_network():
    assert Conditioning().arguments(2) == {}
    guess, image = np.full((2, 4, 4, 1), 3.0), np.full((1, 4, 4, 1), 0.5)
    arguments = Conditioning(image, np.ones((1, 5))).arguments(2, guess)
    assert arguments["features"].shape == (2, 5)
    assert (arguments["condition"] == np.broadcast_to([1.0, 0.5], (2, 4, 4, 2))).all()  # clipped


def test_small_images_are_means_of_blocks():
    x = np.float32(RNG.normal(size=(2, 6, 4, 3)))
    small = network_inputs.averaged(x, (3, 2))
    assert small.shape == (2, 3, 2, 3)
    close(small[1, 2, 1, 0], x[1, 4:6, 2:4, 0].mean(), rtol=1e-6)
    close(jax.jit(lambda x: network_inputs.averaged(x, (3, 2)))(x), small, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="6x4 do not average down to 4x2"):
        network_inputs.averaged(x, (4, 2))


def test_noise_in_the_small_image_is_of_its_level_and_none_at_zero():
    z, noise = (np.float32(RNG.normal(size=(3, 4, 4, 1))) for _ in range(2))
    level = np.float32([0.0, 0.6, 0.8])
    image, levels = jax.jit(lambda *a: network_inputs.low_resolution(*a, (4, 4)))(z, level, noise)
    close(levels[:, 0], level)
    keep, add = np.array([1, 0.8, 0.6]), np.float64(level)
    expected = keep[:, None, None, None] * z + add[:, None, None, None] * noise
    close(image, expected, rtol=1e-5, atol=1e-6)
    assert (image[0] == z[0]).all()


def test_enlarging_is_bilinear():
    """A row 0, 1 at twice the size: pixels' centres at -1/4, 1/4, 3/4 and 5/4 of it."""
    row = np.float32([0, 1]).reshape(1, 1, 2, 1)
    close(network_inputs.enlarged(row, (3, 4))[0, :, :, 0], np.tile([0, 0.25, 0.75, 1], (3, 1)))


def test_prediction_keeps_what_it_learned():
    """A learned variance is that of the second call."""

    def from_estimate(guess):
        return lambda x_t, t: Prediction(x_t + 1, x_t, log_variance=guess)

    found = SelfConditioned(from_estimate)(jnp.zeros(SHAPE), jnp.ones(4))
    assert (found.log_variance == 1).all()
