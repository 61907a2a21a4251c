"""Studies of labelers: what a reward model makes of those it never saw, and of wrong labels.

  python -m instructjax.labelers kfold --workdir=runs/kfold
  python -m instructjax.labelers kfold --data-dir=PATH --workdir=runs/mine
  python -m instructjax.labelers noise --workdir=runs/noise

or, the same with any field changed,

  python -m instructjax --config=configs/labelers.py:study=kfold --workdir=runs/kfold

Without `data_dir` in the miniature world, whose labelers differ in taste and make mistakes; with it
on the rankings and comparisons in PATH that name their labelers (for `kfold` alone; `noise` knows
what is wrong because it has put it there). A small model is pretrained on the text, then a reward
model is trained for each fold or kind of noise, all by one compiled step. `:test` shrinks it.
"""

from ml_collections import ConfigDict

from configs import common, quickstart, real_text
from instructjax.config import parse_arg

STUDIES = ('kfold', 'noise')


def get_config(arg: str = '') -> ConfigDict:
  """The recipe; see the module's docstring for `arg`."""
  arg = parse_arg(arg, study='kfold', data_dir='', test=False, seed=1)
  if arg.study not in STUDIES:
    raise ValueError(f'study={arg.study!r} is none of {", ".join(STUDIES)}')
  c = ConfigDict()
  c.title = f'instructjax: {arg.study} over labelers'
  c.seed = arg.seed
  c.stages = ('pretrain', arg.study)
  c.mesh = common.mesh()
  c.rules = common.network_rules()
  c.tracking = common.tracking()
  c.tracking.tensorboard = False
  if arg.data_dir:
    _files(c, arg.data_dir)
  else:
    _miniature(c)
  c.kfold = common.kfold('reward_model')
  c.noise = common.noise('reward_model')
  if arg.test:
    _shrink(c)
  return c


def _miniature(c: ConfigDict) -> None:
  c.needs = 'some minutes on 2 cores, 2 GiB of memory'
  c.data = quickstart.data()
  c.data.kind = 'panel'
  c.data.labelers = 20
  c.data.documents = 4_000
  c.data.valid_documents = 500
  c.data.panel = common.panel(prompts=1_500, labels_each=2)
  c.tokenizer = common.tokenizer('world')
  c.limits = common.limits(prompt_tokens=60, response_tokens=32)
  c.models = ConfigDict({
    'policy': common.model('tiny', context=96), 'reward': common.model('tiny', context=96)})
  c.pretrain = common.language('pretrain', init=None, batch_size=64, row_length=112, peak=4e-3)
  c.pretrain.optimizer.schedule.warmup_steps = 20
  c.reward_model = common.reward_model(
    init='pretrain', rankings='data', batch_size=32, row_length=256, peak=2e-3)
  c.reward_model.train_epochs = 2.0


def _files(c: ConfigDict, directory: str) -> None:
  c.needs = 'some minutes on 2 cores, 3 GiB of memory'
  c.data = real_text.data(directory)
  c.tokenizer = common.tokenizer('sentencepiece')
  c.limits = common.limits(prompt_tokens=384, response_tokens=384)
  c.models = ConfigDict({
    'policy': common.model('tiny', context=768), 'reward': common.model('tiny', context=768)})
  c.pretrain = common.language('pretrain', init=None, batch_size=16, row_length=384, peak=4e-3)
  c.pretrain.optimizer.schedule.warmup_steps = 20
  c.reward_model = common.reward_model(
    init='pretrain', rankings='data', batch_size=32, row_length=768, peak=2e-3)
  c.reward_model.pair_divisor = 'pair'
  c.reward_model.optimizer.weight_decay = 0.1


def _shrink(c: ConfigDict) -> None:
  """Seconds, for tests."""
  c.title += ' (test)'
  for model in (c.models.policy, c.models.reward):
    model.size, model.width = 'micro', 16
  if c.data.kind == 'panel':
    c.data.update({'users': 40, 'labelers': 8, 'documents': 200, 'valid_documents': 20,
                   'calibration_prompts': 50})
    c.data.panel.prompts = 80
  else:
    c.tokenizer.vocab_size = 400
  c.pretrain.batch_size, c.pretrain.valid_examples = 16, 16
  c.pretrain.optimizer.schedule.warmup_steps = 0
  c.reward_model.batch_size = 8
  c.reward_model.train_epochs = 1.0
  c.kfold.folds, c.kfold.seeds = 2, 2
  c.noise.update({'seeds': 2, 'flip_rates': (0.0, 0.4), 'bad_shares': (0.25,)})
