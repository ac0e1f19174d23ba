"""The keys of a config, with the paper's CIFAR-10 values.

A config file returns `default()` with a few lines changed; `rules` says what each key may be,
`combinations` which go together, and the registries in `ddpm.build` have the names.
"""

from ml_collections import ConfigDict

PARTS = ("bound", "flow", "distances", "neighbours", "pictures")  # of an evaluation
TASKS = ("vary", "inpaint", "interpolate", "reconstruct")  # of editing
WITHOUT_FLOW = tuple(part for part in PARTS if part != "flow")  # of models that have none


def default() -> ConfigDict:
    """Returns a config of every key there is, with the paper's values for CIFAR-10."""
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "cifar10"  # 'digits', 'folder', 'npz', or any image set of tfds
    config.data.path = ""  # of the folder, the .npz, or tfds' data_dir ('': its own default)
    config.data.split = ""  # '': 'train' where the set has splits
    config.data.image_size = ()  # (height, width) to crop and resize to; (): as they are
    config.data.channels = 3  # 1 or 3, for 'folder'
    config.data.flip = True  # random horizontal flips, in training
    config.data.broken_images = "error"  # or 'skip', for 'folder'

    config.model = ConfigDict()
    config.model.name = "unet"  # or "dit", a transformer
    config.model.channels = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.dropout = 0.1
    config.model.num_groups = 32
    config.model.dtype = "float32"  # of the computation; "bfloat16": faster on GPUs and TPUs
    config.model.norm_epsilon = 1e-6
    config.model.head_channels = 0  # of each head of attention; 0: one head
    config.model.symmetric_downsampling = False
    config.model.cosines_first = False  # in the time embedding
    config.model.frequency_shift = 1  # of its frequencies
    config.model.noise_input = "t"  # or "log_snr": what the network is conditioned on
    config.model.num_classes = 0  # of the data's labels, to learn each; 0: without labels
    # Super-resolution: the shorter side of the small image that x_0 is drawn to; 0: from nothing.
    config.model.low_resolution = 0
    config.model.scale_shift = False  # the time scales and shifts norms: IDDPM's, ADM's
    config.model.up_down = "conv"  # or "resblock": within residual blocks, as BigGAN
    config.model.skip_scale = 1.0  # of residual sums; 0.7071: NCSN++'s, DDPM++'s
    config.model.time_features = "sinusoids"  # or "fourier": random ones, as NCSN++
    config.model.input_features = ()  # n of sin and cos(2^n pi x) added to x; VDM's: (7, 8)
    config.model.add_input = False  # x is added to the output: VDM's
    # Of "dit", to which of the above channels, dropout, dtype, norm_epsilon, head_channels,
    # num_classes and what is of time and input apply.
    config.model.patch_size = 2
    config.model.depth = 28

    config.diffusion = ConfigDict()
    config.diffusion.schedule = "linear"
    config.diffusion.num_steps = 1000  # T
    config.diffusion.beta_start = 1e-4
    config.diffusion.beta_end = 0.02
    config.diffusion.betas = ()  # for schedule 'betas': beta_1, .., beta_T
    config.diffusion.log_snr_0 = 13.3  # where 'linear_log_snr' and 'learned' begin
    config.diffusion.log_snr_1 = -5.0  # and end
    config.diffusion.reference_resolution = 0  # shifted as from images this large; 0: not
    config.diffusion.zero_terminal_snr = False  # the schedule rescaled to end without signal
    config.diffusion.prediction = "eps"  # what the network puts out; "edm": preconditioned
    config.diffusion.sigma_data = 0.5  # the data's standard deviation about 0, of EDM
    # Of the reverse steps, in the bound that is trained. A learned one doubles the channels.
    config.diffusion.variance = "fixed_large"

    config.training = ConfigDict()
    config.training.steps = 800_000
    config.training.batch_size = 128  # over all devices together
    config.training.learning_rate = 2e-4
    config.training.warmup_steps = 5000
    config.training.adam_b2 = 0.999
    config.training.weight_decay = 0.0  # AdamW's, in units of the learning rate
    config.training.grad_clip = 1.0  # norm of the whole gradient; 0: not clipped
    config.training.loss = "mse"  # of what the network predicts: L_simple
    config.training.loss_weight = "none"  # of the squared error, by log-SNR; "none": 1 on that
    config.training.min_snr_gamma = 5.0
    config.training.sigmoid_bias = 0.0
    config.training.huber_delta = 1.0
    config.training.times = "uniform"  # how t is drawn
    config.training.ema = "constant"  # or 'warm_up' to ema_decay, 'half_life', 'power'
    config.training.ema_decay = 0.9999
    config.training.label_dropout = 0.1  # share of labels that are left out, for guidance
    config.training.self_conditioning = False  # the network sees what it predicted before
    config.training.augmentation = 0.0  # probability of each change, which the network is given
    config.training.low_resolution_noise = 0.0  # most sigma in the small image, in [0, 1)
    config.training.ema_images = 500_000  # of 'half_life'
    config.training.ema_relative_stds = (0.05, 0.1)  # of 'power': widths; samples by the first
    config.training.ema_snapshot_every = 0  # steps, of 'power': to make any width afterwards
    config.training.log_every = 100
    config.training.sample_every = 50_000  # a grid of samples; 0: at the end only
    config.training.checkpoint_every = 5000
    config.training.checkpoints_kept = 2

    config.sampling = ConfigDict()
    config.sampling.sampler = "ancestral"
    config.sampling.variance = "fixed_large"  # of ancestral
    config.sampling.analytic_images = 64  # that variance 'analytic' is measured on, once
    config.sampling.eta = 0.0  # of ddim
    config.sampling.order = 2  # of dpm_solver and unipc: 1, 2 or 3
    config.sampling.stochastic = False  # dpm_solver for the SDE, not the flow
    config.sampling.churn = 0.0  # of heun: S_churn, noise added again
    config.sampling.churn_range = ()  # (S_tmin, S_tmax) in sigma/alpha; (): everywhere
    config.sampling.churn_noise = 1.0  # S_noise
    config.sampling.tolerance = 1e-4  # of probability_flow, an adaptive solver
    config.sampling.langevin_steps = 5  # of langevin, at each time
    config.sampling.langevin_step_size = 0.2  # in units of sigma_t^2
    config.sampling.corrector_steps = 0  # Langevin steps before each step of any sampler
    config.sampling.corrector_snr = 0.16
    config.sampling.steps = 0  # 0: all T
    config.sampling.grid = "uniform"  # where the steps are
    config.sampling.sigma_max = 80.0  # sigma/alpha where log_snr and karras begin; 0: at T
    config.sampling.rho = 7.0  # of karras
    config.sampling.times = ()  # from T to 0, in place of steps and grid
    config.sampling.clip = True  # x_0 to [-1, 1] at every step
    config.sampling.dynamic_threshold = 0.0  # of clip: by this quantile, 0.995; 0: by 1
    config.sampling.label = -1  # one class for all; -1: sample i is of class i mod num_classes
    config.sampling.guidance_scale = 1.0  # classifier-free; 1: unguided
    config.sampling.guidance_interval = ()  # (lo, hi] in sigma/alpha to guide in; (): everywhere
    config.sampling.guidance_rescale = 0.0  # to the spread of the unguided; 1: wholly
    config.sampling.classifier_scale = 0.0  # by the data's shipped classifier; 0: unguided
    # What is enlarged, sample i from image i mod n: an .npz, pictures or a folder of them; '':
    # held-out data averaged down.
    config.sampling.low_resolution_images = ""
    config.sampling.low_resolution_noise = 0.0  # sigma in them, at most that of training
    config.sampling.ema = True  # the averaged weights, not the last ones
    config.sampling.ema_relative_std = 0.0  # another width, of the snapshots; 0: the run's own
    config.sampling.num_samples = 64
    config.sampling.batch_size = 64
    config.sampling.seed = 0
    config.sampling.mp4 = False  # the chain as MP4 too; needs imageio-ffmpeg

    config.editing = ConfigDict()  # of pictures, by --mode=edit
    config.editing.task = "vary"  # or 'inpaint', 'interpolate', 'reconstruct'
    config.editing.t = 0  # of vary and interpolate: noised to x_t; 0: T / 2
    config.editing.num_variations = 8  # of each picture, by vary and inpaint
    config.editing.mask = ""  # of inpaint: a picture of the model's size, painted where white
    config.editing.box = ()  # or (top, left, height, width), painted within
    config.editing.jump_length = 10  # of inpaint: how many steps it goes back
    config.editing.resamplings = 10  # and how often it comes by; 1: never goes back
    config.editing.fractions = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    config.editing.iterations = 20  # of reconstruct, for each step

    config.comparison = ConfigDict()  # --mode=compare
    # Each a sampler, and what else of config.sampling: "dpm_solver order=3 grid=karras".
    config.comparison.samplers = (
        "ancestral variance=fixed_small",
        "ddim",
        "dpm_solver grid=log_snr",
        "unipc grid=log_snr",
        "dpm_solver stochastic=True grid=log_snr",
        "heun grid=karras",
    )
    config.comparison.steps = (5, 10, 20, 50)  # those of a sampler that names none
    config.comparison.num_samples = 1024
    config.comparison.seed = 0

    config.evaluation = ConfigDict()
    config.evaluation.parts = PARTS
    config.evaluation.split = "test"  # held out; '': none
    config.evaluation.path = ""  # of the held-out folder or .npz, where it is another
    config.evaluation.batch_size = 250
    config.evaluation.bound_times = 20  # terms drawn for each image; 0: all T
    config.evaluation.bound_images = 0  # the first of each split; 0: all
    config.evaluation.flow_images = 256  # the first held out, or without any those of training
    config.evaluation.flow_tolerance = 1e-5
    config.evaluation.flow_exact_trace = False
    config.evaluation.num_samples = 50_000  # for each seed
    config.evaluation.seeds = (0,)  # several: mean and spread
    config.evaluation.samples = ""  # an .npz of samples to judge in place of the run's own
    config.evaluation.features = ""  # a shipped classifier, or 'inception'; '': by the data
    config.evaluation.inception_path = ""  # its weights: .pth, .safetensors or .npz
    config.evaluation.inception_resize = "half_pixel"  # as pytorch-fid; "tf1": as the authors
    return config
