"""AlexNet as the paper states it: Krizhevsky, Sutskever and Hinton, NeurIPS 2012.

    alexnet_jax train --config=paper --workdir=runs/paper --config.data.path=DIR

The paper reports, for one such network, ten views: 37.5% top-1 and 17.0% top-5 error on the ILSVRC-2010 test set, 40.7%
and 18.2% on the ILSVRC-2012 validation set (table 2, "1 CNN"). Five to six days on two GTX 580. Here it was run for a
few updates on 1,000 photos only: see docs/imagenet.md.

The argument `init=authors` (configs/paper.py:init=authors) draws the weights of conv 3, 4 and 5 with the standard
deviation 0.03 of the authors' released code instead of the printed 0.01. With 0.01 and biases of 1 the upper layers
hardly depend on the image at first, and training may stall near ln(1000) = 6.91: this is the remedy.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """arg: None, 'init=paper' (the same) or 'init=authors'."""
    if arg not in (None, 'init=paper', 'init=authors'):
        raise ValueError(f"configs/paper.py has no variant {arg!r}; expected 'init=paper' or 'init=authors'.")

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 128  # images an update, all devices together; section 5
    config.grad_accum_steps = 1  # parts a batch is computed in, one after the other: the same update in less memory
    config.num_epochs = 90.0  # passes through the training set; "roughly 90 cycles", section 5
    config.num_steps = 0  # updates; if not 0, instead of num_epochs
    config.stop_at_error = (
        0.0  # percent; the run ends once a line (see below) has this training error or less; 0: never
    )
    config.log_every_steps = 1  # 0: once an epoch; a line is the mean since the one before
    config.eval_every_steps = 0  # 0: once an epoch
    config.checkpoint_every_steps = 0  # 0: once an epoch; the best is chosen among those saved right after a validation
    config.init_from = ''  # a checkpoint whose parameters to begin with; a classifier of other classes starts afresh
    config.init_fresh = ()  # further layers that are drawn anew all the same: ('conv6', 'fc7')
    config.on_nonfinite = 'stop'  # loss, gradient or update not finite: 'stop', or 'skip' the batch
    config.max_nonfinite = 10  # batches to skip before stopping all the same
    config.deterministic = False  # on a GPU, only operations that give the same bits every time
    config.debug = False  # stop at the first NaN and name the operation; slow

    config.data = ml_collections.ConfigDict()
    config.data.path = ''  # a directory written by alexnet_jax prepare, or 'digits'
    config.data.fraction = 1.0  # of the training images; below 1: a part that is always the same
    config.data.image_size = 224  # side of the random patches, pixels; section 4.1
    config.data.crop_area = ()  # (): patches of the image's own scale; (0.08, 1.0): torchvision's parts of its area
    config.data.random_crop = True  # random patches; section 4.1. False: always the central one
    config.data.all_positions = False  # 32 x 32 patches of 256 px, section 4.1's factor 2048; True: all 33 x 33
    config.data.draw_every = 1  # successive images that share crop and reflection
    config.data.reflect = True  # mirror half of them; section 4.1
    config.data.mean = (
        'crop'  # of the mean image, subtract the part under the crop, its 'center', or a mean a 'channel'
    )
    config.data.pixel_std = (1.0, 1.0, 1.0)  # mean-subtracted R, G, B are divided by these; not in the paper
    config.data.color_std = 0.1  # of the principal components' alphas, 0: off; section 4.1
    config.data.color_scale = 'eigenvalue'  # of the components, section 4.1; 'std': their root
    config.data.color_divide = False  # whether the image is divided by 1 + color_std
    config.data.color_epochs = 0.0  # color goes off after so many epochs; 0: never
    config.data.num_workers = -1  # processes that decode; 0: threads; -1: beside a GPU one a core but one, else threads
    config.data.num_threads = 0  # in each process; 0: the cores, 16 at most, shared between the processes
    config.data.max_unreadable = (
        10  # images in a pass that may be unreadable: they are named and count nothing; more end it
    )
    config.data.cache = ''  # 'host', 'device': all training images in its memory, decoded; '': read as they come

    config.model = ml_collections.ConfigDict()
    # Layers by name: conv, local or fc, and a number; they follow one another in that order. Section 3.5, figure 2.
    # features: kernels or units. kernel, stride, padding (before, after): pixels. groups: 2 reads its own tower only.
    # init, bias: section 5; 'fan_in' draws both as PyTorch does. post: operations that follow, in order.
    # Deviation: the paper does not state paddings; these are the authors'.
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
    layers.fc8 = dict(groups=1, init=normal, bias=0.0, post='')  # num_classes features
    config.model.num_classes = 1000  # width of the last layer
    config.model.pool_window = 3  # px; section 3.4
    config.model.pool_stride = 2  # px; section 3.4
    config.model.lrn_n = 5  # channels; section 3.3, with the next three
    config.model.lrn_k = 2.0
    config.model.lrn_alpha = 1e-4
    config.model.lrn_beta = 0.75
    config.model.lrn_alpha_over_n = False  # as printed; True divides alpha by n
    config.model.norm_groups = 2  # normalization stays within a tower (Deviation from the printed N); 1: across
    config.model.spatial_n = 5  # px; with the next three of 'spatial_norm', which is not in the paper
    config.model.spatial_k = 1.0
    config.model.spatial_alpha = 1e-3  # divided by spatial_n^2
    config.model.spatial_beta = 0.75
    config.model.dropout_rate = 0.5  # section 4.2
    config.model.dropout_inverted = False  # scaled at test, section 4.2; True: in training
    config.model.dtype = 'float32'  # of the computation; parameters are float32

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 0  # parts of a batch; 0: as many as the devices give
    config.mesh.tower = 2  # devices the network is split over; a single device holds both towers

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = 0.01  # section 5
    config.optim.bias_rate = 1.0  # factor of the biases' rate; "an equal learning rate for all layers", section 5
    config.optim.layer_rates = ()  # (('conv1', 0.1), ('conv2', 0.0)): slows a layer, freezes another
    config.optim.momentum = 0.9  # section 5
    config.optim.rate_in_velocity = True  # section 5; False: torch.optim.SGD
    config.optim.weight_decay = 5e-4  # of weights; in an update it is times the learning rate; section 5
    config.optim.bias_decay = 0.0  # the same of biases
    config.optim.layer_decays = ()  # (('fc8', 0.01),): of that layer's weights, instead of weight_decay
    config.optim.trust_coefficient = 0.0  # LARS's trust coefficient, for large batches; 0: off
    config.optim.warmup_epochs = 0.0  # the rate rises over so many epochs; 0: off
    config.optim.schedule = 'plateau'  # 'plateau': follows the validation error; 'epochs': follows stages
    config.optim.drop_factor = 0.1  # section 5
    config.optim.max_drops = 3  # section 5; with 'plateau'
    config.optim.patience = 5  # validations without a gain before a drop; by hand in the paper
    config.optim.min_delta = 0.1  # percentage points of top-1 error that count as a gain; by hand in the paper
    config.optim.stages = ()  # with 'epochs': (from epoch, factor of weights' rates, of biases', layers), see optim.py
    return config
