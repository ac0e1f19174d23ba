"""Pictures of chains: progressive generation, and samples that share a latent."""

import numpy as np

from ddpm.evaluation import report
from ddpm.modes.measures.job import Job, Measured


def pictures_of_chains(job: Job) -> Measured:
    """Draws progressive generation and samples that share a latent (Figures 6 and 7)."""
    run = job.run
    seed = run.built.config.evaluation.seeds[0]
    generator = run.generator(run.built.config.sampling.batch_size)
    predicted = generator.progressive(run.params, 6, seed=seed, snapshots=12)
    columns = len(predicted)
    rows = np.swapaxes(predicted, 0, 1).reshape(-1, *predicted.shape[2:])
    fragments = [
        report.images(rows, "x_0 as predicted along the chain, from t = T to 1.", columns=columns)
    ]
    if not run.built.sampler.draws_noise:
        words = "Samples that share an x_t are one: the steps of this sampler draw nothing."
        fragments.append(report.text(words))
        return Measured("Chains", {"shared_at": []}, [], fragments)
    chain = generator.times
    shared = sorted({chain[(len(chain) - 1) * k // 4] for k in range(4)})
    for t in shared:
        images = generator.sharing(run.params, 9, seed=seed, t=t)
        fragments.append(report.images(images, f"Samples that share x_t at t = {t:g}.", columns=9))
    return Measured("Chains", {"shared_at": shared}, [], fragments)
