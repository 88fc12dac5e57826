"""AlexNet as described in the paper: Krizhevsky, Sutskever and Hinton, NeurIPS 2012.

    alexnet_jax train --config=paper --workdir=runs/paper --config.data.path=DIR

Reported by the paper for one such network, ten views: 37.5% top-1 and 17.0% top-5 error on the ILSVRC-2010 test set,
40.7% and 18.2% on the ILSVRC-2012 validation set (table 2, "1 CNN"); five to six days on two GTX 580. Here: only a few
updates were run, on 1,000 photos (docs/imagenet.md).

`--config=paper:init=authors` draws the weights of conv 3, 4 and 5 with standard deviation 0.03, as the authors'
released code does, instead of the printed 0.01. With 0.01 and biases of 1, the upper layers hardly depend on the image
at first, and training may stall at a loss near ln(1000) = 6.91. If it does, use this variant.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config. arg: 'init=paper' (default) or 'init=authors'."""
    if arg not in (None, 'init=paper', 'init=authors'):
        raise ValueError(f"unknown variant {arg!r}; expected 'init=paper' or 'init=authors'.")

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 128  # images per update, over all devices; section 5
    config.grad_accum_steps = 1  # microbatches per update: the same update in less memory
    config.num_epochs = 90.0  # "roughly 90 cycles", section 5
    config.num_steps = 0  # number of updates; if not 0, replaces num_epochs
    config.stop_at_error = 0.0  # percent; stop once the training error of a log line is at most this; 0: off
    config.log_every_steps = 1  # 0: once per epoch; a log line holds means since the previous line
    config.eval_every_steps = 0  # 0: once per epoch
    config.checkpoint_every_steps = 0  # 0: once per epoch; the best is selected from those saved right after validation
    config.init_from = ''  # checkpoint with initial parameters; reinitializes a classifier of other classes
    config.init_fresh = ()  # further layers to reinitialize despite init_from: ('conv6', 'fc7')
    config.on_nonfinite = 'stop'  # if loss, gradient or update is not finite: 'stop', or 'skip' the batch
    config.max_nonfinite = 10  # with 'skip': allowed number of skipped batches
    config.deterministic = False  # on GPUs, use only operations with bitwise reproducible results
    config.debug = False  # stop at the first NaN and name its operation; slow

    config.data = ml_collections.ConfigDict()
    config.data.path = ''  # a directory written by alexnet_jax prepare, or 'digits'
    config.data.fraction = 1.0  # of the training images to use; a fixed subset
    config.data.image_size = 224  # side of the random crops, pixels; section 4.1
    config.data.crop_area = ()  # (): crops at the image's scale; (0.08, 1.0): fractions of its area, as in torchvision
    config.data.random_crop = True  # section 4.1; False: always the center crop
    config.data.all_positions = False  # False: 32 x 32 positions in 256 px, section 4.1 (factor of 2048); True: 33 x 33
    config.data.draw_every = 1  # number of successive images that share crop and reflection
    config.data.reflect = True  # mirror half of the images; section 4.1
    config.data.mean = 'crop'  # subtract the 'crop' or the 'center' of the mean image, or a mean per 'channel'
    config.data.pixel_std = (1.0, 1.0, 1.0)  # divisors of the mean-subtracted R, G, B; not in the paper
    config.data.color_std = 0.1  # of the alphas of the principal components; 0: off; section 4.1
    config.data.color_scale = 'eigenvalue'  # factor of the alphas, section 4.1; 'std': its square root
    config.data.color_divide = False  # divide the image by 1 + color_std
    config.data.color_epochs = 0.0  # color augmentation ends after this many epochs; 0: never
    config.data.mixup_alpha = 0.0  # 0.2: mix pairs of images with a factor from Beta(0.2, 0.2); 0: off
    config.data.num_workers = -1  # decoding processes; 0: threads; -1: all cores but one with a GPU, else threads
    config.data.num_threads = 0  # decoding threads per process; 0: min(cores, 16), divided among the processes
    config.data.max_unreadable = 10  # allowed number of unreadable images per epoch, which are skipped
    config.data.cache = ''  # keep all decoded training images in 'host' or 'device' memory; '': read from disk

    config.model = ml_collections.ConfigDict()
    # Layers are named conv, local or fc and a number; they run in that order. Section 3.5, figure 2.
    # features: kernels or units. kernel, stride, padding (before, after): pixels. groups=2: reads only its own tower.
    # init, bias: section 5; 'fan_in' draws both as PyTorch does. post: operations after the layer, in order.
    # Deviation: the paper does not state the padding; the authors' padding is used.
    config.model.layers = layers = ml_collections.ConfigDict()
    normal, upper = 'normal(0.01)', 'normal(0.03)' if arg == 'init=authors' else 'normal(0.01)'
    layers.conv1 = dict(
        features=96, kernel=11, stride=4, padding=(0, 3), groups=1, init=normal, bias=0.0, post='relu lrn pool'
    )
    layers.conv2 = dict(
        features=256, kernel=5, stride=1, padding=(2, 2), groups=2, init=normal, bias=1.0, post='relu lrn pool'
    )
    layers.conv3 = dict(features=384, kernel=3, stride=1, padding=(1, 1), groups=1, init=upper, bias=0.0, post='relu')
    layers.conv4 = dict(features=384, kernel=3, stride=1, padding=(1, 1), groups=2, init=upper, bias=1.0, post='relu')
    layers.conv5 = dict(
        features=256, kernel=3, stride=1, padding=(1, 1), groups=2, init=upper, bias=1.0, post='relu pool'
    )
    layers.fc6 = dict(features=4096, groups=1, init=normal, bias=1.0, post='relu dropout')
    layers.fc7 = dict(features=4096, groups=1, init=normal, bias=1.0, post='relu dropout')
    layers.fc8 = dict(groups=1, init=normal, bias=0.0, post='')  # features = num_classes
    config.model.num_classes = 1000  # features of the last layer
    config.model.pool_window = 3  # px; section 3.4
    config.model.pool_stride = 2  # px; section 3.4
    config.model.lrn_n = 5  # channels; this and the next three: section 3.3
    config.model.lrn_k = 2.0
    config.model.lrn_alpha = 1e-4
    config.model.lrn_beta = 0.75
    config.model.lrn_alpha_over_n = False  # as printed; True divides alpha by n
    config.model.norm_groups = 2  # 2: normalize within each tower (Deviation from the printed N); 1: across towers
    config.model.spatial_n = 5  # px; this and the next three: for 'spatial_norm', which is not in the paper
    config.model.spatial_k = 1.0
    config.model.spatial_alpha = 1e-3  # divided by spatial_n^2
    config.model.spatial_beta = 0.75
    config.model.dropout_rate = 0.5  # section 4.2
    config.model.dropout_inverted = False  # False: scale at test time, section 4.2; True: in training
    config.model.dtype = 'float32'  # of activations, or 'bfloat16'; parameters stay float32

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 0  # shards of the batch; 0: as many as the devices allow
    config.mesh.tower = 2  # devices that share the network; a single device holds both towers
    config.mesh.dense = 'replicated'  # over data shards; 'split': over all devices, see docs/scaling.md

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = 0.01  # section 5
    config.optim.bias_rate = 1.0  # factor of bias learning rates; "an equal learning rate for all layers", section 5
    config.optim.layer_rates = ()  # (('conv1', 0.1), ('conv2', 0.0)): slows conv1, freezes conv2
    config.optim.momentum = 0.9  # section 5
    config.optim.rate_in_velocity = True  # section 5; False: as in torch.optim.SGD
    config.optim.weight_decay = 5e-4  # of weights; scaled by the learning rate; section 5
    config.optim.bias_decay = 0.0  # weight decay of biases
    config.optim.layer_decays = ()  # (('fc8', 0.01),): replaces weight_decay for the weights of fc8
    config.optim.trust_coefficient = 0.0  # of LARS, for large batches; 0: off
    config.optim.trust_clip = False  # True: the smaller of the learning rate and LARS's rate, instead of their product
    config.optim.warmup_epochs = 0.0  # the learning rate rises over this many epochs (linearly, but see 'poly'); 0: off
    config.optim.warmup_start = 0.0  # fraction of the learning rate at which it starts to rise
    config.optim.label_smoothing = 0.0  # part of the target that is spread over all classes; 0: off
    config.optim.average_decay = 0.0  # 0.999: evaluate an exponential average of the parameters; 0: off
    config.optim.schedule = 'plateau'  # 'plateau': follow val error; 'epochs': `stages`; 'cosine', 'poly': fall to 0
    config.optim.drop_factor = 0.1  # section 5
    config.optim.max_drops = 3  # section 5; with 'plateau'
    config.optim.patience = 5  # validations without improvement before a drop; the paper's drops were manual
    config.optim.min_delta = 0.1  # smallest improvement of the top-1 error that counts, percentage points
    config.optim.stages = ()  # for 'epochs': (epoch, factor of weight rates, of bias rates, layers), see optim.py
    return config
