"""Every key and what it is for; other configs change values, never keys.

This is a small job on the embedded digits, see `digits.py`.
"""

import dataclasses

import ml_collections

from focusformer_jax import config as config_lib
from focusformer_jax.spaces import search_space


def section(value) -> ml_collections.ConfigDict:
  """A config section out of a dataclass instance."""
  return ml_collections.ConfigDict(dataclasses.asdict(value))


def get_config() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()

  # Everything random in a run follows from it.
  c.seed = 0

  c.data = ml_collections.ConfigDict()
  # A TFDS image-classification data set; `sklearn_digits` ships with us.
  c.data.name = 'sklearn_digits'
  # Where TFDS keeps data sets; None for its default.
  c.data.dir = ml_collections.config_dict.placeholder(str)
  # Pixels along one side of an image.
  c.data.image_size = 8
  # Share of TFDS's train split that rewards the sampler and is not trained on.
  c.data.heldout = 0.1
  # The split that is scored in the end, and that nothing is chosen by.
  c.data.test = 'test'
  # Images of one supernet update, over all devices.
  c.data.batch_size = 128
  # Images of one evaluation step, over all devices.
  c.data.eval_batch_size = 128
  # How often an image stands in a batch, each time augmented anew.
  c.data.repeats = 1
  # Processes that decode images; 0 for threads, enough for small images.
  c.data.workers = 0

  # Changes made to training images on the device; see `config_lib.Augment`.
  c.augment = section(config_lib.Augment(mean=(0.5,), std=(0.5,)))

  # The choices; `focusformer_jax/space.py` names some spaces.
  c.space = section(search_space.PIXELS8)

  c.supernet = ml_collections.ConfigDict()
  # Pixels along one side of a patch.
  c.supernet.patch_size = 2
  # Distances in patches beyond this count as this; AutoFormer's is 14.
  c.supernet.max_relative_position = 14
  # What the head reads: 'mean' of the patches, or the 'cls' token.
  c.supernet.pool = 'mean'
  # Probability of dropping a branch of the last layer; less for earlier ones.
  c.supernet.drop_path = 0.0
  # Of the computation: 'float32' or 'bfloat16'; parameters stay float32.
  c.supernet.dtype = 'float32'
  # 'masked' computes the largest subnet, 'switched' only what is live; 'auto'
  # takes what suits the devices (`supernet.choose_execution`).
  c.supernet.execution = 'auto'
  # Standard deviation of the initial weights; narrow nets want more than the
  # 0.02 that suits hundreds of features.
  c.supernet.init_std = 0.1

  c.optimizer = ml_collections.ConfigDict()
  # AdamW's peak.
  c.optimizer.learning_rate = 4e-3
  # The batch it is meant for: another batch scales it; 0 takes it as it is.
  c.optimizer.reference_batch = 0
  # Where the cosine ends.
  c.optimizer.final_learning_rate = 1e-5
  # Updates of linear warm-up.
  c.optimizer.warmup_steps = 50
  # Not applied to one-dimensional parameters, positions and class token.
  c.optimizer.weight_decay = 0.05
  # Gradients with a larger norm are scaled down to it.
  c.optimizer.clip_norm = 1.0
  # Steps whose gradients are averaged for one update.
  c.optimizer.accumulate = 1
  # Whether entries that no subnet of a step used stay as they are. Otherwise
  # decay and momentum go on moving them.
  c.optimizer.hold_untouched = False
  # Decay of the moving average of weights that is scored and extracted, 0 for
  # none; it starts lower, so that the first weights are soon forgotten.
  c.optimizer.ema = 0.0

  c.distillation = ml_collections.ConfigDict()
  # What subnets learn from the largest, which then trains in every step:
  # 'none', 'kl', or 'alpha', which also punishes overconfidence.
  c.distillation.loss = 'none'
  # Its share of their loss; the labels have the rest.
  c.distillation.weight = 1.0
  # Both are softened by it.
  c.distillation.temperature = 1.0

  c.curriculum = ml_collections.ConfigDict()
  # 'focus' trains what the sampler proposes, 'uniform' draws choices evenly,
  # 'uniform_cost' budgets, 'sandwich' adds the smallest and the largest,
  # 'attentive' keeps one of some candidates by its held-out loss.
  c.curriculum.name = 'focus'
  # Different subnets in one update; they share the batch.
  c.curriculum.subnets = 4
  # Share of all steps that draw evenly before the sampler is asked.
  c.curriculum.warmup = 0.4
  # Probability of an even draw within the budget after that,
  c.curriculum.epsilon = 0.2
  # which moves in a straight line to this one at the last step.
  c.curriculum.final_epsilon = 0.2
  # Candidates for each subnet of 'attentive',
  c.curriculum.candidates = 3
  # and which of them it trains: the 'best' or the 'worst'.
  c.curriculum.keep = 'best'

  c.sampler = ml_collections.ConfigDict()
  # What budgets bound: 'macs', 'params', or 'latency' in microseconds.
  c.sampler.cost = 'macs'
  # The file of measured latencies, from `--mode=profile`; None for none.
  c.sampler.latency = ml_collections.config_dict.placeholder(str)
  # Resolution of exact budgets; more is finer and slower.
  c.sampler.bins = 512
  # Widths of the hidden layers.
  c.sampler.hidden = (64, 64)
  # Fourier features of the budget.
  c.sampler.frequencies = 4
  # Supernet updates between sampler updates.
  c.sampler.every = 10
  # Subnets that one sampler update compares at one budget.
  c.sampler.subnets = 8
  # Held-out images that they are compared on.
  c.sampler.batch_size = 32
  # 'loss' (minus cross-entropy), 'accuracy', 'mnasnet' (accuracy and cost), or
  # 'pareto' (how few others of the update are better and cheaper).
  c.sampler.reward = 'loss'
  # Whether to divide advantages by the spread of the rewards compared.
  c.sampler.scale_rewards = True
  # 'exact' draws within the budget; 'penalty' draws freely and pays for it.
  c.sampler.constraint = 'exact'
  # Reward lost per share of the budget exceeded, for 'penalty'.
  c.sampler.penalty = 1.0
  # Reward lost per share of the budget left unused.
  c.sampler.unused = 0.0
  # How budgets are drawn over the reachable range: 'log' or 'linear'.
  c.sampler.budgets = 'log'
  # How many of them one sampler update draws.
  c.sampler.budgets_per_update = 1
  # Weight of the policy's entropy in its objective after the warm-up,
  c.sampler.entropy = 0.05
  # which moves in a straight line to this one at the last step.
  c.sampler.final_entropy = 0.05
  # Adam's.
  c.sampler.learning_rate = 1e-2

  c.train = ml_collections.ConfigDict()
  # Weights to start from, a .pth or .safetensors file in AutoFormer's names;
  # empty to start afresh.
  c.train.initial = ''
  # Whether the supernet learns. Otherwise every step trains the sampler alone,
  # on weights that stay as they are.
  c.train.supernet = True
  # Supernet updates, or sampler updates where it does not learn.
  c.train.steps = 1200
  # Steps between lines of metrics.
  c.train.log_every = 100
  # Steps between held-out scores of the sampler's proposals.
  c.train.eval_every = 400
  # Steps between checkpoints.
  c.train.checkpoint_every = 200
  # Newest checkpoints that stay on disk.
  c.train.keep_checkpoints = 2
  # Non-finite updates in a row that stop the run; each one is skipped.
  c.train.max_skipped = 10

  c.search = ml_collections.ConfigDict()
  # Which of 'sampler', 'evolution', 'nsga2' and 'random' propose; the first
  # one's largest network is extracted.
  c.search.method = ('sampler', 'random')
  # Costs to stay within; empty for six that span the reachable range.
  c.search.budgets = ()
  # sampler: its own draws per budget that are scored beside what it decodes.
  c.search.draws = 0
  # random: draws per budget.
  c.search.random = 16
  # evolution and nsga2: subnets of a generation. All numbers are AutoFormer's.
  c.search.population = 50
  # Generations, the first one random; evolution has as many for each budget.
  c.search.generations = 20
  # evolution: best subnets so far that the next generation comes from.
  c.search.parents = 10
  # Share of a generation that are mutants of them.
  c.search.mutants = 0.5
  # Share that are children of two of them; the rest are draws.
  c.search.children = 0.5
  # Probability that a mutant's depth is drawn anew, and that its width is.
  c.search.redraw_net = 0.4
  # The same for each other choice of each layer.
  c.search.redraw_layer = 0.2
  # Subnets that one compiled call scores.
  c.search.subnets_per_call = 8

  c.profile = ml_collections.ConfigDict()
  # Images of the batch whose latency is measured, on one device.
  c.profile.batch_size = 32
  # Rounds, each of which times every network once; medians over them count.
  c.profile.repeats = 50
  # Random networks that predictions are checked against.
  c.profile.networks = 20

  c.retrain = ml_collections.ConfigDict()
  # The directory of an extracted network; None for that of this workdir.
  c.retrain.network = ml_collections.config_dict.placeholder(str)
  # Whether to go on from its weights; otherwise from new ones.
  c.retrain.inherit = True
  # Updates.
  c.retrain.steps = 600
  # Steps between held-out scores.
  c.retrain.eval_every = 200
  # Steps between checkpoints.
  c.retrain.checkpoint_every = 200
  # As `config.optimizer`, for a network on its own.
  c.retrain.optimizer = section(
    config_lib.Optimizer(
      learning_rate=1e-3,
      reference_batch=0,
      final_learning_rate=1e-5,
      warmup_steps=20,
      weight_decay=0.05,
      clip_norm=1.0,
      accumulate=1,
      hold_untouched=False,
      ema=0.0,
    )
  )
  c.extract = ml_collections.ConfigDict()
  # What the extracted network may cost, as the sampler answers; 0 for what the
  # search found for its largest budget.
  c.extract.budget = 0.0
  # A file that describes it, such as an `architecture.json`, instead of the
  # sampler's answer; empty for none.
  c.extract.architecture = ''

  c.mesh = ml_collections.ConfigDict()
  # Devices that replicate the parameters; -1 for all that are left.
  c.mesh.data = -1
  # Devices that share them out.
  c.mesh.fsdp = 1

  c.debug = ml_collections.ConfigDict()
  # Stops training at the first operation whose result is not a number; slow.
  c.debug.nans = False
  return c


def shorten(c: ml_collections.ConfigDict) -> None:
  """Cuts a job down to a few steps, for tests."""
  c.train.steps = 8
  c.train.log_every = 2
  c.train.eval_every = 8
  c.train.checkpoint_every = 4
  c.optimizer.warmup_steps = 2
  c.sampler.every = 1
  c.sampler.subnets = 4
  # Half as long to compile.
  c.supernet.execution = 'masked'
  c.search.random = 4
  c.search.population = 4
  c.search.generations = 2
  c.search.parents = 2
  c.profile.repeats = 3
  c.profile.networks = 4
  c.retrain.steps = 4
  c.retrain.eval_every = 4
  c.retrain.checkpoint_every = 2
  c.retrain.optimizer.warmup_steps = 1


def shrink(c: ml_collections.ConfigDict) -> None:
  """Cuts a job on larger images down, for tests: a narrow space, few images."""
  c.data.batch_size = 16
  c.data.eval_batch_size = 16
  c.sampler.batch_size = 16
  c.space = section(
    search_space.SearchSpace(
      embed_dim=(24, 48),
      depth=(1, 2),
      num_heads=(1, 2),
      mlp_ratio=(1.0, 2.0),
      head_dim=16,
    )
  )
  shorten(c)
