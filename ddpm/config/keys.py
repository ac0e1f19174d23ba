"""The keys of a config, with the paper's CIFAR-10 values.

A config file returns `default()` with a few keys changed. `rules` has the types and ranges of
values, `combinations` the keys that must agree, the registries in `ddpm.build` the allowed names.
"""

from ml_collections import ConfigDict

PARTS = ("bound", "flow", "distances", "neighbours", "pictures", "energy")  # of --mode=evaluate
OF_ANY = PARTS[:-1]  # those of models without a normalised energy too
DECODERS = ("mean", "ancestral", "flow")  # of --mode=decompress
TASKS = ("vary", "inpaint", "interpolate", "reconstruct")  # of --mode=edit
WITHOUT_FLOW = tuple(part for part in OF_ANY if part != "flow")  # for models without one


def default() -> ConfigDict:
    """Returns a config of every key there is, with the paper's values for CIFAR-10."""
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "cifar10"  # 'digits', 'folder', 'npz', or any image data set of tfds
    config.data.path = ""  # the folder, the .npz, or tfds' data_dir ('': its default)
    config.data.split = ""  # '': 'train' if the data set has splits
    config.data.image_size = ()  # (height, width) to crop and resize to; (): unchanged
    config.data.channels = 3  # 1 or 3, for 'folder'
    config.data.flip = True  # random horizontal flips in training
    config.data.on_device = "auto"  # the whole set: "always", "never", or where it is small
    config.data.broken_images = "error"  # or 'skip', for 'folder'
    config.data.background = "white"  # on which transparent pictures are composited
    config.data.max_pixels = 50_000_000  # of a picture file; larger ones are broken

    config.model = ConfigDict()
    config.model.name = "unet"  # or "dit", a transformer
    # The scalar whose gradient by x is the output: "denoising", "inner_product" or "norm".
    config.model.energy = "none"
    config.model.channels = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.dropout = 0.1
    config.model.num_groups = 32
    config.model.dtype = "float32"  # of the computation; "bfloat16": faster on GPUs and TPUs
    config.model.remat = "none"  # to train in less memory: "blocks", or "full" for still less
    config.model.scan_blocks = False  # compiles equal blocks in a row once, as one scan
    config.model.norm_epsilon = 1e-6
    config.model.head_channels = 0  # channels of each attention head; 0: a single head
    config.model.symmetric_downsampling = False
    config.model.cosines_first = False  # order in the time embedding
    config.model.frequency_shift = 1  # of the time embedding's frequencies
    config.model.noise_input = "t"  # conditions the network; "log_snr", or "none": NCSNv2's
    config.model.num_classes = 0  # for conditioning on labels; 0: no labels
    # Super-resolution: the shorter side of the small image to condition on; 0: none.
    config.model.low_resolution = 0
    config.model.scale_shift = False  # time scales and shifts the norms' outputs, as in IDDPM, ADM
    config.model.up_down = "conv"  # or "resblock": inside residual blocks, as in BigGAN
    config.model.skip_scale = 1.0  # scales residual sums; 0.7071 in NCSN++ and DDPM++
    config.model.time_features = "sinusoids"  # or "fourier": random features, as in NCSN++
    config.model.input_features = ()  # n of sin and cos(2^n pi x) added to the input; VDM: (7, 8)
    config.model.add_input = False  # adds x to the output, as in VDM
    # For "dit", which also uses channels, dropout, dtype, norm_epsilon, head_channels, num_classes
    # and the keys of time and input above.
    config.model.patch_size = 2
    config.model.depth = 28

    config.diffusion = ConfigDict()
    config.diffusion.schedule = "linear"
    config.diffusion.num_steps = 1000  # T
    config.diffusion.beta_start = 1e-4
    config.diffusion.beta_end = 0.02
    config.diffusion.betas = ()  # for schedule 'betas': beta_1, .., beta_T
    config.diffusion.log_snr_0 = 13.3  # start of 'linear_log_snr' and 'learned'
    config.diffusion.log_snr_1 = -5.0  # and their end
    # sigma/alpha at t = 1 and t = T of 'geometric', for data in [-1, 1]: twice those for [0, 1].
    config.diffusion.sigma_min = 0.02
    config.diffusion.sigma_max = 100.0
    config.diffusion.reference_resolution = 0  # shifts the schedule from images this large; 0: off
    config.diffusion.zero_terminal_snr = False  # rescales the schedule to end without signal
    config.diffusion.prediction = "eps"  # what the network predicts; "edm": preconditioned
    config.diffusion.sigma_data = 0.5  # the data's standard deviation about 0, for EDM
    # Of the reverse steps in training with the bound. A learned one doubles the output channels.
    config.diffusion.variance = "fixed_large"

    config.training = ConfigDict()
    config.training.steps = 800_000
    config.training.batch_size = 128  # total over all devices
    config.training.steps_per_dispatch = 0  # steps that a device is given at once; 0: by the device
    config.training.accumulation = 1  # parts that a batch is taken in, for less memory
    config.training.learning_rate = 2e-4
    config.training.warmup_steps = 5000
    config.training.adam_b2 = 0.999
    config.training.moments_dtype = "float32"  # of Adam's first moment; "bfloat16": less memory
    config.training.weight_decay = 0.0  # AdamW, in units of the learning rate
    config.training.grad_clip = 1.0  # global norm of the gradient; 0: not clipped
    config.training.loss = "mse"  # on what the network predicts; for eps, L_simple
    config.training.loss_weight = "none"  # of the squared error, by log-SNR; "none": unweighted
    config.training.min_snr_gamma = 5.0
    config.training.sigmoid_bias = 0.0
    config.training.huber_delta = 1.0
    config.training.time_weight = 1.0  # for 'dual': of the error in the noise level's derivative
    config.training.times = "uniform"  # how t is drawn
    config.training.ema = "constant"  # or 'warm_up' to ema_decay, 'half_life', 'power'
    config.training.ema_decay = 0.9999
    config.training.label_dropout = 0.1  # share of labels dropped, for classifier-free guidance
    config.training.self_conditioning = False  # conditions on its previous x_0 estimate
    config.training.augmentation = 0.0  # probability of each change, which the network sees
    config.training.low_resolution_noise = 0.0  # maximum sigma in the small image, in [0, 1)
    config.training.ema_images = 500_000  # for 'half_life'
    config.training.ema_relative_stds = (0.05, 0.1)  # for 'power': widths; samples use the first
    config.training.ema_snapshot_every = 0  # steps, for 'power': to make any width later
    config.training.log_every = 100
    config.training.sample_every = 50_000  # a grid of samples; 0: only at the end
    config.training.checkpoint_every = 5000
    config.training.checkpoints_kept = 2

    config.sampling = ConfigDict()
    config.sampling.sampler = "ancestral"
    config.sampling.variance = "fixed_large"  # for ancestral
    config.sampling.analytic_images = 64  # to measure variance 'analytic' on, once
    config.sampling.eta = 0.0  # for ddim
    config.sampling.order = 2  # for dpm_solver (1, 2 if stochastic) and unipc: 1, 2 or 3
    config.sampling.stochastic = False  # dpm_solver for the SDE, not the ODE
    config.sampling.churn = 0.0  # for heun: S_churn, noise added back
    config.sampling.churn_range = ()  # (S_tmin, S_tmax) in sigma/alpha; (): everywhere
    config.sampling.churn_noise = 1.0  # S_noise
    config.sampling.tolerance = 1e-4  # for probability_flow, an adaptive solver
    config.sampling.langevin_steps = 5  # for langevin, at each time
    config.sampling.langevin_step_size = 0.2  # in units of sigma_t^2
    config.sampling.corrector_steps = 0  # Langevin steps before each step of any sampler
    config.sampling.corrector_snr = 0.16
    config.sampling.steps = 0  # 0: all T
    config.sampling.grid = "uniform"  # spacing of the steps
    config.sampling.sigma_max = 80.0  # sigma/alpha at which log_snr and karras begin; 0: at T
    config.sampling.rho = 7.0  # for karras
    config.sampling.times = ()  # from T to 0, instead of steps and grid
    config.sampling.clip = True  # clips x_0 to [-1, 1] at every step
    config.sampling.dynamic_threshold = 0.0  # clips at this quantile, e.g. 0.995; 0: at 1
    config.sampling.label = -1  # one class for all; -1: sample i is of class i mod num_classes
    config.sampling.guidance_scale = 1.0  # classifier-free; 1: unguided
    config.sampling.guidance_interval = ()  # (lo, hi] in sigma/alpha to guide in; (): everywhere
    config.sampling.guidance_rescale = 0.0  # to the conditional's standard deviation; 1: fully
    config.sampling.classifier_scale = 0.0  # guidance by the shipped classifier; 0: unguided
    # The images to enlarge, sample i from image i mod n: an .npz, pictures or a folder of them; '':
    # held-out data averaged down.
    config.sampling.low_resolution_images = ""
    config.sampling.low_resolution_noise = 0.0  # sigma added to them, at most training's
    config.sampling.ema = True  # the averaged weights, not the last ones
    config.sampling.ema_relative_std = 0.0  # another width, from snapshots; 0: the run's own
    config.sampling.num_samples = 64
    config.sampling.batch_size = 64
    config.sampling.seed = 0
    config.sampling.mp4 = False  # also writes the chain as MP4; needs imageio-ffmpeg

    config.editing = ConfigDict()  # --mode=edit
    config.editing.task = "vary"  # or 'inpaint', 'interpolate', 'reconstruct'
    config.editing.t = 0  # for vary and interpolate: noise to x_t; 0: T / 2
    config.editing.num_variations = 8  # of each picture, for vary and inpaint
    config.editing.mask = ""  # for inpaint: a picture of the model's size, repainted where white
    config.editing.box = ()  # or (top, left, height, width), repainted inside
    config.editing.jump_length = 10  # for inpaint: the number of steps it goes back
    config.editing.resamplings = 10  # and how often each step is taken; 1: never goes back
    config.editing.fractions = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    config.editing.iterations = 20  # for reconstruct, at each step

    config.codec = ConfigDict()  # --mode=compress and decompress
    config.codec.nu = 12  # bits of the trellis' state; one more: twice the time, 1 % less
    config.codec.together = 1  # images of the model's size in one file; the more, the fewer bits
    config.codec.seed = 0
    config.codec.decoder = "mean"  # of a file's x_t; or a sample, 'ancestral', or by the 'flow'

    config.comparison = ConfigDict()  # --mode=compare
    # Each is a sampler with other keys of config.sampling: "dpm_solver order=3 grid=karras".
    config.comparison.samplers = (
        "ancestral variance=fixed_small",
        "ddim",
        "dpm_solver grid=log_snr",
        "unipc grid=log_snr",
        "dpm_solver stochastic=True grid=log_snr",
        "heun grid=karras",
    )
    config.comparison.steps = (5, 10, 20, 50)  # for samplers that name none
    config.comparison.num_samples = 1024
    config.comparison.seed = 0

    config.evaluation = ConfigDict()
    config.evaluation.parts = OF_ANY
    config.evaluation.split = "test"  # held out; '': none
    config.evaluation.path = ""  # the held-out folder or .npz, if it is another
    config.evaluation.batch_size = 250
    config.evaluation.bound_times = 20  # terms drawn per image; 0: all T
    config.evaluation.bound_images = 0  # the first n of each split, for 'energy' too; 0: all
    config.evaluation.foreign = ""  # for 'energy': 'digits' or a set of tfds, resized; '': none
    config.evaluation.flow_images = 256  # the first n held-out images, or without any of training
    config.evaluation.flow_tolerance = 1e-5
    config.evaluation.flow_exact_trace = False
    config.evaluation.num_samples = 50_000  # per seed
    config.evaluation.seeds = (0,)  # several: mean and standard deviation
    config.evaluation.samples = ""  # an .npz of samples to evaluate instead of the run's own
    config.evaluation.features = ""  # a shipped classifier, or 'inception'; '': by the data
    config.evaluation.inception_path = ""  # its weights: .pth, .safetensors or .npz
    config.evaluation.inception_resize = "half_pixel"  # as in pytorch-fid; "tf1": as the authors'
    return config
