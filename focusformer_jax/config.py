"""Every key of the configuration: its type, default, meaning and range.

The defaults are a small job on scikit-learn's digits; `configs/digits.py` also
sets `sampler.window`, `curriculum.strata` and `curriculum.warmup`.
A config file takes `default()`, a `ConfigDict`, and changes what differs;
`parse` turns it into `Settings` and names the key that is unknown, of a wrong
type or out of range.

`docs/configuration.md` is made from this file; see `config_docs.py`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import ml_collections

from focusformer_jax import schema
from focusformer_jax.spaces import search_space

key = schema.key
to_config_dict = schema.to_config_dict


@dataclasses.dataclass(frozen=True)
class Data(schema.Section):
  """Data set, its splits, and batches."""

  name: str = key(
    'sklearn_digits',
    'An image-classification data set of TFDS, or one of the built-in '
    '`sklearn_digits` and `image_folder`.',
  )
  dir: str | None = key(
    None,
    "Directory of TFDS's data sets, or of the images of `image_folder`; None "
    "for TFDS's default.",
  )
  image_size: int = key(
    8, 'Height and width of an image, in pixels.', at_least=1
  )
  heldout: float = key(
    0.1,
    'Share of the train split that rewards the sampler and is never trained '
    'on.',
    at_least=0.01,
    at_most=0.9,
  )
  test: str = key(
    'test',
    'Split for the final scores; nothing is selected by them.',
  )
  batch_size: int = key(
    128, 'Images per supernet update, over all devices.', at_least=1
  )
  eval_batch_size: int = key(
    128, 'Images per evaluation step, over all devices.', at_least=1
  )
  repeats: int = key(
    1,
    'Copies of each image in a batch, each with its own augmentation.',
    at_least=1,
  )
  workers: int = key(
    -1,
    'Processes that read and decode images; 0 reads in threads. -1 takes '
    'processes for encoded images on more than 8 cores, one for every two '
    'cores, and threads otherwise.',
    at_least=-1,
  )
  cache: str | None = key(
    None,
    'Directory on a local disk for decoded training images, written '
    'once; every epoch then crops these instead of decoding again; None for '
    'no cache. At 3 bytes per pixel, the 1.15 million training images of '
    'ImageNet take 300 GB with `cache_side=256` and 76 GB with 128. The '
    'file is mapped into memory: the operating system keeps what fits there, '
    'and reads the rest from the disk in every epoch.',
  )
  cache_side: int = key(
    256,
    'Shorter side of the images in `cache`, in pixels. Larger images are '
    'shrunk to it, so small crops of them lose detail.',
    at_least=1,
  )


@dataclasses.dataclass(frozen=True)
class Augment(schema.Section):
  """Augmentation of training images, on the device.

  `Augment()` only scales pixels to the range from 0 to 1.

  Raises:
    ValueError: A field is out of its range, both crops are on, or mean and std
      differ in length.
  """

  crop_padding: int = key(
    0,
    'Pixels of black added to each side before a random crop to the original '
    'size.',
    at_least=0,
  )
  resized_crop: tuple[float, float] | None = key(
    None,
    'Smallest and largest share of the area that a random crop keeps before it '
    'is stretched to the image size; None for no crop. Encoded images are '
    'cropped while they are decoded; with None, their center is used.',
    above=0,
    at_most=1,
  )
  flip: bool = key(False, 'Mirror images horizontally with probability 0.5.')
  randaugment_layers: int = key(
    0, 'RandAugment operations per image.', at_least=0
  )
  randaugment_magnitude: float = key(
    9.0, 'Mean severity of an operation.', at_least=0, at_most=10
  )
  randaugment_std: float = key(
    0.5, 'Standard deviation of the severity.', at_least=0
  )
  erase: float = key(
    0.0,
    'Probability of replacing a box with Gaussian noise.',
    at_least=0,
    at_most=1,
  )
  mixup: float = key(
    0.0,
    'Both parameters of the beta distribution of mixup weights; 0 turns mixup '
    'off.',
    at_least=0,
  )
  cutmix: float = key(
    0.0,
    'Both parameters of the beta distribution of the share of an image outside '
    'the box; 0 turns cutmix off.',
    at_least=0,
  )
  switch: float = key(
    0.5,
    'Probability of cutmix instead of mixup when both are on.',
    at_least=0,
    at_most=1,
  )
  label_smoothing: float = key(
    0.0,
    'Probability mass spread evenly over all classes.',
    at_least=0,
    at_most=1,
  )
  mean: tuple[float, ...] = key(
    (0.0,),
    'Mean that normalization subtracts, where white is 1: one number, or one '
    'per channel.',
    at_least=0,
    at_most=1,
  )
  std: tuple[float, ...] = key(
    (1.0,),
    'Standard deviation that normalization divides by, where white is 1; as '
    'many numbers as `mean`.',
    above=0,
  )

  def __post_init__(self):
    super().__post_init__()
    if self.resized_crop is not None:
      if self.resized_crop[0] > self.resized_crop[1]:
        raise ValueError(
          f'resized_crop: wanted ascending numbers, found {self.resized_crop}'
        )
      if self.crop_padding:
        raise ValueError(
          f'crop_padding: wanted 0 with resized_crop, found {self.crop_padding}'
        )
    if not self.mean:
      raise ValueError('mean: wanted one or more numbers, found ()')
    if len(self.std) != len(self.mean):
      raise ValueError(
        f'std: wanted {len(self.mean)} numbers, one for each mean, found '
        f'{self.std}'
      )


@dataclasses.dataclass(frozen=True)
class Supernet(schema.Section):
  """The weight-sharing vision transformer."""

  patch_size: int = key(
    2, 'Height and width of a patch, in pixels.', at_least=1
  )
  max_relative_position: int = key(
    14,
    'Distance, in patches along one axis, beyond which relative positions are '
    'not told apart; 14 in AutoFormer. 0 for no relative position.',
    at_least=0,
  )
  pool: str = key(
    'mean',
    'Input of the classifier: `mean` of the patches, the `cls` token, or '
    '`fc_norm`, the mean of the patches, normalized after it is taken.',
    choices=('mean', 'cls', 'fc_norm'),
  )
  class_token: bool = key(True, 'Whether a class token precedes the patches.')
  registers: int = key(
    0, 'Register tokens between class token and patches.', at_least=0
  )
  head: bool = key(
    True,
    'Whether there is a classifier. A network without one returns its pooled '
    'features.',
  )
  norm_eps: float = key(1e-5, 'Epsilon of the layer normalization.', above=0)
  norms_by_width: bool = key(
    False,
    'Give each width of `space.embed_dim` its own scale and bias in every '
    'layer normalization; otherwise widths share prefixes of one.',
  )
  drop_path: float = key(
    0.0,
    'Probability of dropping a branch of the last layer; it falls linearly to '
    '0 at the first layer. A `cnn` drops none.',
    at_least=0,
    at_most=0.9,
  )
  dtype: str = key(
    'float32',
    'Type of the computation; parameters are always float32.',
    choices=('float32', 'bfloat16'),
  )
  execution: str = key(
    'auto',
    '`masked` computes the largest subnet and masks features, `switched` '
    'computes live slices only, and `auto` chooses by the devices.',
    choices=('auto', 'masked', 'switched'),
  )
  attention: str = key(
    'auto',
    '`einsum` runs everywhere, `cudnn` in bfloat16 on NVIDIA GPUs, `pallas` on '
    'TPUs, and `auto` chooses by the devices.',
    choices=('auto', 'einsum', 'cudnn', 'pallas'),
  )
  remat: str = key(
    'auto',
    'What the backward pass of masked execution computes again: each branch of '
    'a layer in `full`, all but the results of its products in `dots`, or '
    'nothing in `none`; `auto` is `dots` where these fit into half of the '
    "device's memory.",
    choices=('auto', 'full', 'dots', 'none'),
  )
  init_std: float = key(
    0.1,
    'Standard deviation of the initial weights. 0.02 suits widths of several '
    'hundred; narrow networks need more.',
    above=0,
  )

  def __post_init__(self):
    super().__post_init__()
    if self.pool == 'cls' and not self.class_token:
      raise ValueError(
        'pool: wanted mean or fc_norm with class_token=False, found cls'
      )


@dataclasses.dataclass(frozen=True)
class Optimizer(schema.Section):
  """AdamW with linear warm-up and cosine decay.

  Raises:
    ValueError: A field is out of its range, or the learning rate would rise
      from its peak to its end.
  """

  learning_rate: float = key(4e-3, 'Peak learning rate.', above=0)
  final_learning_rate: float = key(
    1e-5, 'Learning rate at the end of the cosine.', at_least=0
  )
  warmup_steps: int = key(50, 'Training steps of linear warm-up.', at_least=0)
  weight_decay: float = key(
    0.05,
    'Weight decay of all parameters except biases, norms, positions, the class '
    'token and registers.',
    at_least=0,
  )
  clip_norm: float = key(
    1.0, 'Global norm to which larger gradients are scaled down.', above=0
  )
  reference_batch: int = key(
    0,
    'Batch size that the learning rates were tuned for; they are scaled '
    'linearly to the actual batch size. 0: no scaling.',
    at_least=0,
  )
  accumulate: int = key(
    1, 'Steps whose gradients are averaged for one update.', at_least=1
  )
  hold_untouched: bool = key(
    False,
    'Leave weights unchanged that no subnet of a step used; otherwise weight '
    'decay and momentum keep moving them.',
  )
  layer_decay: float = key(
    1.0,
    'Factor between the learning rates of neighboring layers: the head has the '
    'full rate, the last layer this share of it, the first layer and the stem '
    'the least. 1 for the same rate everywhere.',
    above=0,
    at_most=1,
  )
  ema: float = key(
    0.0,
    'Decay of the moving average of the weights that is evaluated and '
    'extracted; 0 for none. It starts lower, so that the initial weights are '
    'forgotten soon.',
    at_least=0,
    at_most=0.99999,
  )

  def __post_init__(self):
    super().__post_init__()
    if self.final_learning_rate > self.learning_rate:
      raise ValueError(
        f'final_learning_rate: wanted at most learning_rate='
        f'{self.learning_rate}, found {self.final_learning_rate}'
      )


@dataclasses.dataclass(frozen=True)
class Distillation(schema.Section):
  """Distillation from the largest subnet, or from a frozen network."""

  loss: str = key(
    'none',
    'Loss between subnets and their teacher: `none`, `kl`, or `alpha`, the '
    'adaptive alpha-divergence, which also penalizes overconfidence; of '
    'networks without classes `features`, by angle and length.',
    choices=('none', 'kl', 'alpha', 'features'),
  )
  teacher: str = key(
    'largest',
    '`largest`, the largest subnet, which then trains on the labels in every '
    'step; or, frozen, `initial`, the network of `train.initial` as it came, '
    'or the directory of an extracted or retrained network for the same images '
    'and classes.',
  )
  weight: float = key(
    1.0,
    'Weight of this loss; the labels have the remaining weight.',
    at_least=0,
    at_most=1,
  )
  temperature: float = key(
    1.0, 'Softmax temperature of teacher and student.', above=0
  )

  def __post_init__(self):
    super().__post_init__()
    if self.teacher != 'largest' and self.loss == 'none':
      raise ValueError(
        'loss: wanted kl, alpha or features for '
        f'teacher={self.teacher}, found none'
      )

  @property
  def trains_largest(self) -> bool:
    """Whether the largest subnet trains in every step, to teach the others."""
    return self.loss != 'none' and self.teacher == 'largest'


@dataclasses.dataclass(frozen=True)
class Curriculum(schema.Section):
  """Choice of the subnets that train."""

  name: str = key(
    'focus',
    '`focus` trains proposals of the sampler. `uniform` draws each choice '
    'uniformly. `uniform_cost` draws a budget, then an architecture within it. '
    '`sandwich` trains the smallest, the largest and uniform draws. '
    '`attentive` keeps one of several candidates by its held-out loss. `shift` '
    'draws more often from those parts of the cost range whose held-out loss '
    'still falls.',
    choices=(
      'uniform',
      'uniform_cost',
      'sandwich',
      'attentive',
      'focus',
      'shift',
    ),
  )
  subnets: int = key(
    4,
    'Different subnets per update; they share the batch evenly.',
    at_least=1,
  )
  warmup: float = key(
    0.2,
    '`focus`: share of all steps that draw uniformly before the sampler is '
    'used.',
    at_least=0,
    at_most=1,
  )
  epsilon: float = key(
    0.2,
    '`focus`: probability, right after the warm-up, of a uniform draw within '
    'the budget instead of a proposal.',
    at_least=0,
    at_most=1,
  )
  final_epsilon: float = key(
    0.2,
    '`focus`: that probability at the last step; linear from `epsilon`.',
    at_least=0,
    at_most=1,
  )
  candidates: int = key(
    3, '`attentive`: candidates for each subnet.', at_least=2
  )
  keep: str = key(
    'best',
    '`attentive`: which candidate to train.',
    choices=('best', 'worst'),
  )
  parts: int = key(
    4,
    '`shift`: number of equal parts of the logarithm of the cost range.',
    at_least=2,
  )
  look_every: int = key(
    200,
    '`shift`: steps between looks at the held-out loss of each part.',
    at_least=1,
  )
  strata: bool = key(
    False,
    '`focus`, `uniform_cost` and `attentive`: draw the budgets of the subnets '
    'of an update from as many equal parts of their range, one from each.',
  )
  tilt: float = key(
    0.0,
    '`focus`: how much more often large budgets are drawn at the last step. '
    'The density at the position u of the range, from 0 to 1, is proportional '
    'to u to the power of a number that grows linearly from 0 at the end of '
    'the warm-up to this one.',
    at_least=0,
  )
  largest: float = key(
    0.0,
    '`focus`: probability that an update trains the largest subnet in place '
    'of its last one, in the warm-up too. It is 0 where the largest subnet '
    'teaches, and so trains in every update.',
    at_least=0,
    at_most=1,
  )
  decay: tuple[float, float] | None = key(
    None,
    'Exponents g of the smallest and the largest subnet, linear in the '
    'logarithm of the cost in between. After the share t of all steps, losses '
    'weigh (1 - t)^g relative to the mean over the subnets of an update. '
    'None: equal weights.',
    at_least=0,
  )


@dataclasses.dataclass(frozen=True)
class Sampler(schema.Section):
  """The policy that answers budgets, its rewards, and its learning."""

  cost: str = key(
    'macs',
    'Cost that budgets bound; latency is in microseconds.',
    choices=('macs', 'params', 'latency'),
  )
  latency: str | None = key(
    None,
    'File of measured latencies, written by `--mode=profile`; required for '
    '`cost=latency`.',
  )
  bins: int = key(
    512,
    'Number of bins of the cost range; more bins waste less of a budget and '
    'are slower.',
    at_least=1,
  )
  hidden: tuple[int, ...] = key(
    (64, 64), "Widths of the policy network's hidden layers.", at_least=1
  )
  frequencies: int = key(
    4, 'Fourier features of the budget: number of frequencies.', at_least=0
  )
  every: int = key(10, 'Supernet updates per sampler update.', at_least=1)
  subnets: int = key(
    8,
    'Subnets compared at one budget in a sampler update.',
    at_least=2,
  )
  batch_size: int = key(
    32, 'Held-out images on which subnets are compared.', at_least=1
  )
  reward: str = key(
    'loss',
    '`loss` is minus the cross-entropy, `mnasnet` combines accuracy and cost, '
    'and `pareto` is minus the share of compared subnets that are better in '
    'one of loss and cost and no worse in the other.',
    choices=('loss', 'accuracy', 'mnasnet', 'pareto'),
  )
  scale_rewards: bool = key(
    True,
    'Divide advantages by the standard deviation of the compared rewards.',
  )
  shrink: bool = key(
    False,
    'Multiply advantages by the share of the variance of the compared losses '
    'or accuracies that is not noise from the choice of held-out images; for '
    'the rewards `loss` and `accuracy`.',
  )
  constraint: str = key(
    'exact',
    '`exact` draws within the budget; `penalty` draws freely and loses reward '
    'for exceeding it.',
    choices=('exact', 'penalty'),
  )
  penalty: float = key(
    1.0,
    '`penalty`: weight of the relative excess over the budget, which is '
    'subtracted from the reward.',
    at_least=0,
  )
  unused: float = key(
    0.0,
    'Weight of the unused share of the budget, which is subtracted from the '
    'reward.',
    at_least=0,
  )
  budgets: str = key(
    'log',
    'Distribution of training budgets: uniform in the logarithm of the cost, '
    'or in the cost.',
    choices=('log', 'linear'),
  )
  budgets_per_update: int = key(1, 'Budgets per sampler update.', at_least=1)
  window: float = key(
    0.0,
    'Lower bound of costs, as a share of the budget: for the draws of `focus` '
    'after its warm-up, for the comparisons of the sampler, and for its '
    'proposals and draws in a search. Dropped where no subnet is in between. '
    '0: no lower bound.',
    at_least=0,
    at_most=0.99,
  )
  entropy: float = key(
    0.05,
    "Weight of the policy's entropy in its objective right after the warm-up, "
    'where `target_entropy` is 0.',
    at_least=0,
  )
  final_entropy: float = key(
    0.05,
    "Weight of the policy's entropy at the last step; linear from `entropy`.",
    at_least=0,
  )
  target_entropy: float = key(
    0.0,
    'Entropy that the policy is steered to right after the warm-up, as a share '
    'of the highest possible one at the budget, which is the logarithm of the '
    'number of subnets. 0: it is not steered.',
    at_least=0,
    at_most=1,
  )
  final_target_entropy: float = key(
    0.0,
    'That share at the last step; linear from `target_entropy`.',
    at_least=0,
    at_most=1,
  )
  steering: float = key(
    0.3,
    'Weight of half the squared distance, in nats, of the entropy from its '
    'target.',
    above=0,
  )
  learning_rate: float = key(1e-2, "Adam's learning rate.", above=0)

  def __post_init__(self):
    super().__post_init__()
    if self.shrink and self.reward not in ('loss', 'accuracy'):
      raise ValueError(
        f'shrink: wanted False with reward={self.reward}, which is not a mean '
        'over images, found True'
      )
    if self.shrink and self.batch_size < 2:
      raise ValueError('batch_size: wanted at least 2 with shrink, found 1')
    if self.final_target_entropy and not self.target_entropy:
      raise ValueError(
        'target_entropy: wanted more than 0 with final_target_entropy='
        f'{self.final_target_entropy}, found 0'
      )
    if self.window and self.constraint == 'penalty':
      raise ValueError(
        f'window: wanted 0 with constraint=penalty, which draws freely, found '
        f'{self.window}'
      )


@dataclasses.dataclass(frozen=True)
class Train(schema.Section):
  """Supernet training: length, logs, checkpoints."""

  initial: str = key(
    '',
    'Initial supernet weights: a .pth or .safetensors file with the parameter '
    'names of AutoFormer, timm or transformers, or the directory of an '
    'extracted network; empty for random weights. `config.pretrained` makes a '
    'space around all but those of AutoFormer.',
  )
  supernet: bool = key(
    True,
    'Train the supernet. False trains the sampler alone, on fixed weights.',
  )
  steps: int = key(
    1200,
    'Supernet updates, or sampler updates if the supernet is not trained.',
    at_least=1,
  )
  log_every: int = key(100, 'Steps between lines of metrics.', at_least=1)
  eval_every: int = key(
    400,
    "Steps between held-out evaluations of the sampler's proposals.",
    at_least=1,
  )
  checkpoint_every: int = key(200, 'Steps between checkpoints.', at_least=1)
  keep_checkpoints: int = key(
    2, 'Number of newest checkpoints kept on disk.', at_least=1
  )
  max_skipped: int = key(
    10,
    'Consecutive non-finite updates, each of them skipped, that stop the run.',
    at_least=1,
  )


@dataclasses.dataclass(frozen=True)
class Pretrained(schema.Section):
  """The pretrained network in `train.initial`, and the space around it.

  The network becomes the largest subnet. It decides on `space` and on those
  keys of `supernet` that describe a network.
  """

  num_heads: int | None = key(
    None,
    'Number of heads of every layer, which the file does not store; None for '
    'heads of 64 channels, if that divides the width.',
    at_least=1,
  )
  pool: str | None = key(
    None,
    'Input of the classifier, which the file does not tell: the `cls` token or '
    'the `mean` of the patches. None for the class token, or for the mean '
    'where there is an `fc_norm` or no class token.',
    choices=('cls', 'mean'),
  )
  interpolate: bool = key(
    False,
    'Interpolate the position embedding of a file where `data.image_size` is '
    "another than the network's.",
  )
  widths: tuple[float, ...] = key(
    (0.5, 0.75, 1.0),
    "Choices of the token width, as shares of the network's.",
    above=0,
    at_most=1,
  )
  depths: tuple[float, ...] = key(
    (0.5, 0.625, 0.75, 0.875, 1.0),
    "Choices of the number of layers, as shares of the network's.",
    above=0,
    at_most=1,
  )
  heads: tuple[float, ...] = key(
    (0.5, 0.75, 1.0),
    "Choices of the number of heads, as shares of the network's.",
    above=0,
    at_most=1,
  )
  ratios: tuple[float, ...] = key(
    (0.25, 0.5, 0.75, 1.0),
    "Choices of the MLP ratio, as shares of the network's.",
    above=0,
    at_most=1,
  )
  importance: str = key(
    'taylor',
    'Scores by which features, heads and MLP units are sorted before training: '
    '`taylor`, the change of the predictions that removing one causes, to '
    'first order; `magnitude`, the sum of its squared weights; or `none`, '
    'which also leaves the layers in their order. Otherwise layers are ranked '
    'by what dropping them changes.',
    choices=('taylor', 'magnitude', 'none'),
  )
  images: int = key(
    256, 'Held-out images for the importance scores.', at_least=1
  )


@dataclasses.dataclass(frozen=True)
class Search(schema.Section):
  """Search for an architecture per budget; evolution as in AutoFormer."""

  method: tuple[str, ...] = key(
    ('sampler', 'random'),
    'Methods to run: `sampler`, `random`, `evolution` or `nsga2`, the names in '
    '`search/methods.py`. The answer of the first one to the largest budget is '
    'extracted.',
  )
  budgets: tuple[float, ...] = key(
    (),
    'Upper bounds on the cost, in units of `sampler.cost`; empty for six that '
    'span the reachable range.',
    above=0,
  )
  score: str = key(
    'loss',
    'The criterion of the choice, on held-out images: the `loss`, or the '
    '`calibrated_loss`, at the temperature of the logits that fits each '
    'network best. Long training makes large networks overconfident, which '
    'the first counts against them.',
    choices=('loss', 'calibrated_loss'),
  )
  draws: int = key(
    0,
    '`sampler`: samples per budget that are evaluated beside the most probable '
    'architecture.',
    at_least=0,
  )
  candidates: int = key(
    16,
    '`sampler`: budgets, spread over the reachable range, whose proposals are '
    'evaluated too. The answer to a budget is the best proposal within it, so '
    'a larger budget never gets a worse answer. 0: the proposal to the budget '
    'itself, which is not evaluated.',
    at_least=0,
  )
  random: int = key(16, '`random`: samples per budget.', at_least=1)
  population: int = key(
    50,
    '`evolution` and `nsga2`: architectures per generation.',
    at_least=2,
  )
  generations: int = key(
    20,
    '`evolution` and `nsga2`: number of generations, the random first one '
    'included; `evolution` runs them for each budget.',
    at_least=1,
  )
  parents: int = key(
    10,
    '`evolution`: best architectures so far from which the next generation is '
    'made.',
    at_least=1,
  )
  mutants: float = key(
    0.5,
    '`evolution`: share of mutated parents in a generation.',
    at_least=0,
    at_most=1,
  )
  children: float = key(
    0.5,
    '`evolution`: share of crossovers of two parents; the rest is drawn at '
    'random.',
    at_least=0,
    at_most=1,
  )
  redraw_net: float = key(
    0.4,
    'Mutation probability of the depth, and of the width.',
    at_least=0,
    at_most=1,
  )
  redraw_layer: float = key(
    0.2,
    'Mutation probability of each choice of a layer.',
    at_least=0,
    at_most=1,
  )
  subnets_per_call: int = key(
    8, 'Subnets that one compiled call evaluates.', at_least=1
  )

  def __post_init__(self):
    super().__post_init__()
    if not self.method or len(set(self.method)) < len(self.method):
      raise ValueError(
        f'method: wanted one or more different names, found {self.method}'
      )
    if self.mutants + self.children > 1:
      raise ValueError(
        f'children: wanted at most {1 - self.mutants:g}, the share that '
        f'search.mutants={self.mutants:g} leaves, found {self.children:g}'
      )


@dataclasses.dataclass(frozen=True)
class Profile(schema.Section):
  """Latency measurement, on one device."""

  batch_size: int = key(
    32, 'Images per batch whose latency is measured.', at_least=1
  )
  repeats: int = key(
    50,
    'Rounds, each of which times every network once; the median counts.',
    at_least=1,
  )
  networks: int = key(
    20, 'Random networks on which predictions are checked.', at_least=3
  )


@dataclasses.dataclass(frozen=True)
class Retrain(schema.Section):
  """Training of an extracted network, or of a new CNN."""

  network: str | None = key(
    None,
    'Directory of an extracted network; None for the one in this workdir; '
    '`cnn` for a convolutional network with new weights, to be a teacher.',
  )
  cnn_channels: tuple[int, ...] = key(
    (32, 64, 128),
    'Channels of each stage of the `cnn`; every stage after the first halves '
    'the resolution.',
    at_least=1,
  )
  cnn_blocks: int = key(2, 'Residual blocks of each stage.', at_least=1)
  inherit: bool = key(
    True,
    'Start from the weights of `network`; otherwise from random ones, as `cnn` '
    'always does.',
  )
  steps: int = key(600, 'Updates.', at_least=1)
  eval_every: int = key(200, 'Steps between held-out evaluations.', at_least=1)
  checkpoint_every: int = key(200, 'Steps between checkpoints.', at_least=1)
  optimizer: Optimizer = Optimizer(learning_rate=1e-3, warmup_steps=20)

  def __post_init__(self):
    super().__post_init__()
    if not self.cnn_channels:
      raise ValueError('cnn_channels: wanted at least one stage, found none')
    if self.network == 'cnn' and self.optimizer.layer_decay < 1:
      raise ValueError(
        'optimizer.layer_decay: wanted 1 for network=cnn, found '
        f'{self.optimizer.layer_decay}'
      )

  @property
  def inherits(self) -> bool:
    """Whether training starts from the weights of a network."""
    return self.inherit and self.network != 'cnn'


@dataclasses.dataclass(frozen=True)
class Extract(schema.Section):
  """The network that is extracted."""

  budget: float = key(
    0.0,
    "Upper bound on its cost, for the sampler's answer; 0 for the search's "
    'result at the largest budget.',
    at_least=0,
  )
  architecture: str = key(
    '',
    'File that describes the architecture, such as an `architecture.json`, '
    "to extract instead of the sampler's answer; empty for none.",
  )

  def __post_init__(self):
    super().__post_init__()
    if self.budget and self.architecture:
      raise ValueError(
        f'budget: wanted 0 with architecture={self.architecture}, found '
        f'{self.budget:g}'
      )


@dataclasses.dataclass(frozen=True)
class Export(schema.Section):
  """What `--mode=export` writes."""

  budgets: tuple[float, ...] = key(
    (),
    'Budgets to export the networks for, in units of `sampler.cost`; empty for '
    'the network of `config.extract`, or with `demo` for those of the search.',
    above=0,
  )
  int8: bool = key(
    False,
    'Also write weights of 8 bits, with a scale for each output channel, and '
    'measure the accuracy that they cost.',
  )
  demo: bool = key(
    False, 'Also write a page that runs the networks in a browser.'
  )
  onnxruntime_web: str = key(
    '',
    'Directory of the npm package onnxruntime-web, whose files are copied to '
    'the page; empty for a page that loads them from a CDN.',
  )


@dataclasses.dataclass(frozen=True)
class Mesh(schema.Section):
  """Arrangement of the devices."""

  data: int = key(
    -1,
    'Devices along the axis that replicates parameters; -1 for all remaining.',
    at_least=-1,
  )
  fsdp: int = key(
    1, 'Devices along the axis that shards parameters.', at_least=1
  )


@dataclasses.dataclass(frozen=True)
class Debug(schema.Section):
  """Aids for finding errors."""

  nans: bool = key(
    False, 'Stop at the first operation that yields a NaN; slow.'
  )
  trace: bool = key(
    False,
    "Write a profiler's trace of steps 11 to 20 of a training run to "
    '`<workdir>/trace`, or `<workdir>/retrain/trace`.',
  )


@dataclasses.dataclass(frozen=True)
class Settings(schema.Section):
  """A validated configuration; `Settings()` has every default.

  Raises:
    ValueError: Keys of different sections contradict each other.
  """

  seed: int = key(
    0, 'Seed of all random numbers.', at_least=0, at_most=2**32 - 1
  )
  data: Data = Data()
  augment: Augment = Augment(mean=(0.5,), std=(0.5,))
  space: search_space.SearchSpace = search_space.PIXELS8
  supernet: Supernet = Supernet()
  optimizer: Optimizer = Optimizer()
  distillation: Distillation = Distillation()
  curriculum: Curriculum = Curriculum()
  sampler: Sampler = Sampler()
  train: Train = Train()
  pretrained: Pretrained = Pretrained()
  search: Search = Search()
  profile: Profile = Profile()
  retrain: Retrain = Retrain()
  extract: Extract = Extract()
  export: Export = Export()
  mesh: Mesh = Mesh()
  debug: Debug = Debug()

  def __post_init__(self):
    super().__post_init__()
    batch_size, subnets = self.data.batch_size, self.curriculum.subnets
    if batch_size % subnets:
      raise ValueError(
        'curriculum.subnets: wanted a divisor of config.data.batch_size='
        f'{batch_size}, found {subnets}'
      )
    least = 1 if self.distillation.trains_largest else 2
    if self.curriculum.name == 'sandwich' and subnets < least:
      raise ValueError(
        f'curriculum.subnets: wanted at least {least} for sandwich, found '
        f'{subnets}'
      )
    if not (self.train.supernet or self.train.initial):
      raise ValueError(
        'train.initial: wanted a file of weights for a supernet that is not '
        'trained (config.train.supernet=False), found none'
      )
    if batch_size % self.data.repeats:
      raise ValueError(
        'data.repeats: wanted a divisor of config.data.batch_size='
        f'{batch_size}, found {self.data.repeats}'
      )
    stages, size = len(self.retrain.cnn_channels), self.data.image_size
    if self.retrain.network == 'cnn' and 2 ** (stages - 1) > size:
      raise ValueError(
        f'retrain.cnn_channels: wanted at most {size.bit_length()} stages for '
        f'images of {size} pixels, found {stages}'
      )
    if self.sampler.cost == 'latency' and self.sampler.latency is None:
      raise ValueError(
        'sampler.latency: wanted the table measured by --mode=profile, for '
        'config.sampler.cost=latency, found None'
      )

  def without_cache(self) -> 'Settings':
    """The settings without a cache of images, for where nothing is trained."""
    data = dataclasses.replace(self.data, cache=None)
    return dataclasses.replace(self, data=data)


def default() -> ml_collections.ConfigDict:
  """The defaults, for a config file to change."""
  return to_config_dict(Settings())


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Settings:
  """Checks a config and freezes it.

  Args:
    config: What a config file returns, or the contents of a run's
      `config.json`; keys that are absent have their defaults.

  Raises:
    UserError: Names the key, the values that were wanted, and the value found.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return schema.replace(Settings(), config, 'config')
