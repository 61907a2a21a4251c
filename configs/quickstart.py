"""The whole recipe on the embedded miniature world, on a laptop's CPU.

  python -m instructjax --config=configs/quickstart.py --workdir=runs/quickstart

Arguments: `:test` is a run of a minute for tests; `:plain` adds plain PPO and the control that
gets the same ptx text without PPO; `:tax` adds PPO and PPO-ptx that nothing holds near the start,
for the alignment tax at equal KL; `:dpo` adds DPO on the same rankings; `:sweep` adds PPO over
ptx_coef and kl_coef. In the workdir of a finished run, its own presets named again, only what
was added is computed. `seed=N` seeds everything, the world included.

The paper's ptx_coef of 27.8 is stable here in 30 iterations at kl_coef 0.05, 0.1 and 0.2 (seed 1;
both terms means over their tokens, whole gradient clipped to norm 1, learning rate 1e-3): the
largest ratio of a token was 2.8, where 5 saw up to 16, 1 up to 9 and no ptx up to 6, in another
run of the same arms 36. Its gradient is nine times that of PPO, so under clipping and Adam the PPO
step gets smaller: validation score 0.23 to 0.29 at a KL of 0.28 to 0.29, where 5 comes to 0.51 to
0.68 at 0.46 to 0.53, with the same pretraining loss (0.608 and 0.609, start 0.616).
"""

from ml_collections import ConfigDict

from configs import common
from instructjax.config import parse_arg

# Peak policy learning rate of plain PPO, matched in strength to PPO-ptx (see `_add_plain`).
PLAIN_PEAK = 5e-4


def data() -> ConfigDict:
  """The miniature world and how much of it is used."""
  c = ConfigDict()
  c.kind = 'miniature'
  # The world's own seed; None takes the run's.
  c.seed = common.placeholder(int)
  c.users = 400
  c.labelers = 12
  # Two labelers agree on this share of the pairs that both rank strictly.
  c.labeler_agreement = 0.73
  c.calibration_prompts = 1_500
  c.documents = 40_000
  c.valid_documents = 2_000
  c.demonstrations = 20_000
  c.valid_demonstrations = 1_000
  c.ppo_prompts = 8_000
  c.rank_prompts = 24_000
  c.rank_valid_prompts = 600
  c.valid_prompts = 600
  c.test_prompts = 1_000
  return c


def get_config(arg: str = '') -> ConfigDict:
  """The recipe; see the module's docstring for `arg`."""
  arg = parse_arg(arg, test=False, plain=False, tax=False, dpo=False, sweep=False, seed=1)
  c = ConfigDict()
  c.title = 'instructjax quickstart: the InstructGPT recipe in a miniature world'
  c.seed = arg.seed
  # Printed before the run starts.
  c.needs = '6 to 10 minutes on 2 cores, 3 GiB of memory, 200 MB of disk'
  c.stages = ('pretrain', 'sft', 'rl_init', 'collect', 'reward_model', 'select', 'ppo', 'evaluate')
  c.data = data()
  c.tokenizer = common.tokenizer('world')
  c.limits = common.limits(prompt_tokens=40, response_tokens=16)
  c.models = ConfigDict({
    'policy': common.model('tiny', context=64), 'reward': common.model('tiny', context=64)})
  c.mesh = common.mesh()
  c.rules = common.network_rules()
  c.tracking = common.tracking()

  # A row holds two of the longest documents, of 56 words.
  c.pretrain = common.language(
    'pretrain', init=None, batch_size=64, row_length=112, peak=4e-3)
  c.pretrain.train_epochs = 2.0
  c.pretrain.optimizer.schedule.warmup_steps = 50

  c.sft = common.language(
    'demonstrations', init='pretrain', batch_size=36, row_length=96, peak=2.5e-3)
  c.sft.train_epochs = 4.0
  c.sft.optimizer.schedule.warmup_steps = 50
  c.sft.pretrain_share = 0.1
  c.sft.pretrain_weight = 0.3
  c.sft.candidates = 4

  c.rl_init = common.language(
    'demonstrations', init='pretrain', batch_size=36, row_length=96, peak=2.5e-3)
  # The paper takes 2 of its 16 epochs. Here 2 leave it well behind SFT (42 % against it), and PPO
  # starts from there: on a seed kept for this 4 bring 72.2 instead of 69.4 % after PPO-ptx.
  c.rl_init.train_epochs = 4.0
  c.rl_init.optimizer.schedule.warmup_steps = 50
  # The paper mixes 10 % pretraining data in (facts B3).
  c.rl_init.pretrain_share = 0.1

  c.collect = common.collect('sft')
  c.reward_model = common.reward_model(
    init='sft', rankings='collect', batch_size=32, row_length=256, peak=1.5e-3)
  # The reward model is what limits PPO here. On a seed kept for this: 85.5 % agreement with gold
  # from five epochs of 14,000 rankings, 88.1 % from four of 24,000 and the average of the weights;
  # three of 36,000 (87.5 %) and eight of 24,000 (87.2 %) bring no more.
  c.reward_model.train_epochs = 4.0
  c.reward_model.ema_decay = 0.998
  c.reward_model.optimizer.schedule.warmup_steps = 20
  c.select = common.select(candidates='sft', reward='reward_model', prompts=400)

  c.ppo = common.ppo(
    init='rl_init', ref='rl_init', reward='reward_model', batch_size=512, steps=60)
  c.ppo.minibatches = 4
  # The paper takes 8 documents for each episode; half a document is enough in this world.
  c.ppo.ptx_ratio = 0.5
  c.ppo.ptx_coef = 5.0
  c.ppo.kl_coef = 0.1
  c.ppo.policy_optimizer.schedule.peak = 1e-3
  c.ppo.value_optimizer.schedule.peak = 1e-3
  # At this learning rate the average of the weights is steadier than the weights themselves.
  c.ppo.release = 'ema'
  c.ppo.valid_steps = 10
  c.ppo.checkpoint_steps = 10

  c.evaluate = common.evaluate(prompts=1_000)
  c.evaluate.models = ConfigDict({
    'base': ('pretrain', None), 'rl_init': ('rl_init', None), 'ppo_ptx': ('ppo', None),
    'ppo_ptx_raw': ('ppo', 'params')})
  c.evaluate.traces = ('ppo',)
  if arg.test:
    _shrink(c)
  c.plan = _plan(c.data)
  if arg.plain:
    _add_plain(c)
  if arg.tax:
    _add_tax(c)
  if arg.dpo:
    _add_dpo(c)
  if arg.sweep:
    _add_sweep(c)
  return c


def _plan(data: ConfigDict) -> ConfigDict:
  """Rows of the world, and their lengths as measured on seed 1."""
  c = common.plan(
    devices=1, device='cpu', documents=data.documents, document_tokens=(47.6, 5.6),
    demonstrations=data.demonstrations, demonstration_tokens=((15.9, 6.4), (9.8, 2.7)),
    rankings=data.rank_prompts, ranking_tokens=((16.0, 6.8), (9.8, 2.7)),
    prompts=data.ppo_prompts, prompt_tokens=(16.0, 6.8), sampled_tokens=(10.4, 3.0))
  c.vocab_size = 248
  return c


def _also(c: ConfigDict, name: str, arms: dict[str, ConfigDict]) -> None:
  """Adds stages and an evaluation of them; the stages of the main run stay as they are."""
  c[name] = c.evaluate.copy_and_resolve_references()
  c[name].models_only = True
  c[name].models = ConfigDict({stage: (stage, None) for stage in arms})
  c[name].traces = tuple(s for s, sub in arms.items() if sub.kind == 'ppo')
  for stage, sub in arms.items():
    c[stage] = sub
  c.stages = (*c.stages, *arms, name)


def _add_plain(c: ConfigDict) -> None:
  """Plain PPO at matched strength, and `rl_init` given the same ptx text without PPO.

  Adam divides by the size of the whole gradient, so the ptx gradient also shrinks the PPO step;
  plain PPO takes a smaller learning rate for steps of about the same size.
  """
  plain = c.ppo.copy_and_resolve_references()
  plain.ptx_coef = 0.0
  plain.policy_optimizer.schedule.peak = PLAIN_PEAK
  control = common.language(
    'pretrain', init='rl_init',
    batch_size=round(c.ppo.batch_size * c.ppo.ptx_ratio / c.ppo.minibatches),
    row_length=c.ppo.ptx_row_length, peak=c.ppo.policy_optimizer.schedule.peak)
  control.train_steps = c.ppo.train_steps * c.ppo.minibatches
  control.optimizer.schedule.shape = 'constant'
  _also(c, 'evaluate_plain', {'ppo_plain': plain, 'ptx_control': control})


def _add_tax(c: ConfigDict) -> None:
  """Both arms of the tax comparison: equal but for ptx_coef, without a KL penalty.

  With the penalty of `ppo` neither arm goes beyond a KL of about 1.5, where plain PPO has paid
  little yet. `python -m instructjax.report RUN... --out DIR --ppo-stage ppo_tax_plain --ptx-stage
  ppo_tax_ptx` compares their traces.
  """
  arms = {}
  for name, coef in (('ppo_tax_plain', 0.0), ('ppo_tax_ptx', c.ppo.ptx_coef)):
    arms[name] = c.ppo.copy_and_resolve_references()
    arms[name].update({'ptx_coef': coef, 'kl_coef': 0.0, 'release': 'raw'})
  _also(c, 'evaluate_tax', arms)


def _add_dpo(c: ConfigDict) -> None:
  """DPO from where PPO starts, on the rankings that the reward model learnt from."""
  arm = common.dpo(
    init='rl_init', ref='rl_init', rankings='collect', batch_size=32, row_length=256, peak=3e-4)
  arm.optimizer.schedule.warmup_steps = 20
  _also(c, 'evaluate_dpo', {'dpo': arm})


def _add_sweep(c: ConfigDict) -> None:
  """ptx_coef 0, 1, 5, 27.8 at three strengths of the KL penalty, 30 iterations each."""
  arms = {}
  for kl in (0.5, 1.0, 2.0):
    for coef in (0.0, 1.0, 5.0, 27.8):
      arm = c.ppo.copy_and_resolve_references()
      arm.ptx_coef, arm.kl_coef = coef, c.ppo.kl_coef * kl
      arm.train_steps = min(30, c.ppo.train_steps)
      arms[f'ppo_sweep_ptx{coef:g}_kl{arm.kl_coef:g}'.replace('.', '_')] = arm
  _also(c, 'evaluate_sweep', arms)
  # Where each arm ends is enough here.
  c.evaluate_sweep.traces = ()


def _shrink(c: ConfigDict) -> None:
  """A minute for tests: every stage, little of everything."""
  c.title += ' (test)'
  c.data.update({
    'documents': 2_000, 'valid_documents': 200, 'demonstrations': 1_000,
    'valid_demonstrations': 100, 'ppo_prompts': 400, 'rank_prompts': 200,
    'rank_valid_prompts': 60, 'valid_prompts': 60, 'test_prompts': 60,
    'calibration_prompts': 100})
  c.pretrain.valid_examples = c.sft.valid_examples = c.rl_init.valid_examples = 64
  for stage in (c.pretrain, c.sft, c.rl_init):
    stage.train_epochs = 1.0
    stage.batch_size = 32
    stage.optimizer.schedule.warmup_steps = 4
  c.sft.candidates = 2
  c.collect.batch_size = 64
  c.reward_model.valid_examples = c.reward_model.bias_demonstrations = 48
  c.reward_model.ema_decay = 0.5
  c.select.prompts = 32
  c.ppo.batch_size = 32
  c.ppo.train_steps = 4
  c.ppo.valid_steps = c.ppo.checkpoint_steps = 2
  c.ppo.valid_prompts = 32
  c.evaluate.update({
    'prompts': 48, 'samples': 2, 'documents': 64, 'best_of': (2, 4), 'best_of_prompts': 32,
    'batch_size': 64, 'resamples': 200, 'temperatures': (0.0, 1.0)})
