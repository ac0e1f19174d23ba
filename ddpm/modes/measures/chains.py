"""Pictures of chains: progressive generation, and samples that share a latent."""

import numpy as np

from ddpm.evaluation import report
from ddpm.modes.measures.job import Job, Measured
from ddpm.sampling.samplers import times


def pictures_of_chains(job: Job) -> Measured:
    """Progressive generation, and samples that share a latent: the paper's Figures 6 and 7."""
    run = job.run
    seed = run.built.config.evaluation.seeds[0]
    generator = run.generator(run.built.config.sampling.batch_size)
    predicted = generator.progressive(run.params, 6, seed=seed, snapshots=12)
    columns = len(predicted)
    rows = np.swapaxes(predicted, 0, 1).reshape(-1, *predicted.shape[2:])
    fragments = [
        report.images(rows, "x_0 as predicted along the chain, from t = T to 1.", columns=columns)
    ]
    sampling = run.built.config.sampling
    if sampling.sampler == "ddim" and sampling.eta == 0:
        fragments.append(
            report.text("Samples that share an x_t are one: DDIM's steps draw nothing.")
        )
        return Measured("Chains", {"shared_at": []}, [], fragments)
    chain = times(run.built.schedule.num_steps, run.built.config.sampling.steps or None)
    shared = [int(chain[len(chain) * k // 4]) for k in range(3, -1, -1)]
    for t in shared:
        images = generator.sharing(run.params, 9, seed=seed, t=t)
        fragments.append(report.images(images, f"Samples that share x_t at t = {t}.", columns=9))
    return Measured("Chains", {"shared_at": shared}, [], fragments)
