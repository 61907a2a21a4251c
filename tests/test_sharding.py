"""Every algorithm's step on any mesh: the same numbers, the same samples, the shardings it says.

The reference is the mesh (1, 1, 1) on one device; the others use the eight fake CPU devices.
`UPDATE_GOLDEN=1` rewrites golden/sharding.json.
"""

import dataclasses
import json
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checking import assert_close

from configs import common
from instructjax import collectives, loop, sharding, train_state, tree
from instructjax.algorithms import dpo, language_model, ppo, rollout
from instructjax.algorithms.reward_model import make_reward_model
from instructjax.checkpoint import Checkpoints
from instructjax.data.order import Sequential
from instructjax.data.pipeline import LanguageLoader, PreferenceLoader, PromptLoader, RankingLoader
from instructjax.data.placement import Group, LanguageItem, RankingItem
from instructjax.metrics import compute_metrics
from instructjax.models import heads, transformer
from instructjax.sampling import Sampling
from instructjax.stages import saved
from instructjax.types import Rows

pytestmark = pytest.mark.usefixtures('quick_compilation')
GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'sharding.json'
AXES = ('data', 'fsdp', 'tensor')
MESHES = {'data': (8, 1, 1), 'fsdp': (1, 8, 1), 'mixed': (2, 2, 2), 'tensor': (1, 1, 8)}

# Every split dimension is a multiple of 8: heads, width, feed-forward, vocabulary.
MODEL = transformer.ModelConfig(
  vocab_size=22, padded_vocab_size=24, context=12, layers=1, width=32, heads=8, mlp_width=64,
  dropout=0.1, compute_dtype='float32', remat='none', init_std=0.2, attention='auto',
  logits_mib=256)
RULES = dict(common.rules())
END, PROMPT, RESPONSE = 1, 5, 4
STEPS = 2

SETTINGS = ppo.PPOSettings(
  epochs=1, minibatches=2, microbatches=1, gamma=1.0, gae_lambda=0.95, clip_range=0.2,
  value_clip_range=0.2, value_coef=1.0, entropy_coef=0.0, kl_coef=0.1, kl_target=3.0,
  kl_horizon=100.0, kl_loss='none', kl_loss_coef=0.0, score_bias=0.0, score_scale=1.0,
  score_clip=None, missing_end_penalty=1.0, missing_end_score=None, whiten_rewards=True,
  whiten_advantages='minibatch', unit='token')


def make_mesh(shape):
  sizes = dict(zip(AXES, shape))
  return sharding.make_mesh(sizes, jax.devices()[:int(np.prod(shape))])


def draw(rng, low, high):
  return rng.integers(2, MODEL.vocab_size, rng.integers(low, high + 1)).astype(np.int32)


def demonstrations(n):
  rng = np.random.default_rng(0)
  made = []
  for _ in range(n):
    trunk, branch = draw(rng, 1, PROMPT), draw(rng, 1, RESPONSE)
    made.append(LanguageItem(
      Group(trunk, (branch,), 0), np.zeros(trunk.size, np.float32),
      np.ones(branch.size, np.float32)))
  return made


def documents(n):
  rng = np.random.default_rng(1)
  made = []
  for _ in range(n):
    trunk = draw(rng, 3, 12)
    weight = np.ones(trunk.size, np.float32)
    weight[0] = 0
    made.append(LanguageItem(Group(trunk, (), 0), weight, np.zeros(0, np.float32)))
  return made


def rankings(n):
  rng = np.random.default_rng(2)
  made = []
  for i in range(n):
    k = 2 + i % 3
    group = Group(draw(rng, 1, PROMPT), tuple(draw(rng, 1, RESPONSE) for _ in range(k)), 0)
    made.append(RankingItem(
      group, np.triu(np.ones((k, k), np.float32), 1), np.full((k, k), 0.1, np.float32)))
  return made


def language_loader(mesh, found, size, microbatches):
  return LanguageLoader(
    found, Sequential(len(found)), batch_size=size, microbatches=microbatches, row_length=12,
    select_slots=12, rows_multiple=sharding.batch_shards(mesh))


def text_loader(mesh, microbatches):
  return language_loader(mesh, documents(32), 16, microbatches)


def language(mesh):
  """SFT with a pretraining mix, dropout on, two microbatches of demonstrations."""
  examples, text = language_loader(mesh, demonstrations(32), 16, 2), text_loader(mesh, 1)
  algorithm = language_model.with_ptx(
    language_model.make_language_model(MODEL, unit='token', z_loss=1e-2), MODEL, ptx_coef=0.5,
    unit='token')
  return algorithm, {}, lambda step: {
    'examples': examples.batch(step), 'pretrain': text.batch(step)}


def reward_model(mesh):
  loader = RankingLoader(
    rankings(16), Sequential(16), batch_size=8, microbatches=1, row_length=16, select_slots=8,
    rows_multiple=sharding.batch_shards(mesh), responses=4)
  return (make_reward_model(MODEL, pair_divisor='kept'), {},
          lambda step: {'rankings': loader.batch(step)})


def direct(mesh):
  """DPO with dropout on, two microbatches of rankings."""
  loader = PreferenceLoader(
    rankings(32), Sequential(32), batch_size=16, microbatches=2, row_length=16, select_slots=12,
    rows_multiple=sharding.batch_shards(mesh), responses=4, response_length=RESPONSE)
  algorithm = dpo.make_dpo(MODEL, MODEL, beta=0.5, label_smoothing=0.1, pair_divisor='kept')
  return (algorithm, {'ref': initial(mesh, 'policy', 5)},
          lambda step: {'preferences': loader.batch(step)})


def length_reward(prompt, response, row):
  return 0.1 * len(response.split()) + 0.01 * row


def ppo_ptx(mesh, row_length=None):
  """Rewards by a model and a function, KL to another policy, ptx, resharded to generate."""
  rng = np.random.default_rng(3)
  prompts = PromptLoader(
    [draw(rng, 1, PROMPT) for _ in range(32)], Sequential(32), batch_size=16,
    prompt_length=PROMPT, pad_id=0)
  text = text_loader(mesh, SETTINGS.minibatches)
  collect = rollout.make_collect(
    SETTINGS, MODEL, MODEL, MODEL, Sampling(RESPONSE, END),
    (rollout.ModelReward('reward_model', 1.0, 'reward', MODEL),
     rollout.FunctionReward('length', 0.5, length_reward)),
    lambda ids: ' '.join(map(str, ids)), mesh, generation_shardings(mesh), row_length=row_length)
  algorithm = language_model.with_ptx(
    ppo.make_ppo(SETTINGS, MODEL, MODEL, MODEL, collect), MODEL, ptx_coef=0.7, unit='token')
  frozen = {'ref': initial(mesh, 'policy', 5), 'reward': initial(mesh, 'reward', 6)}
  return algorithm, frozen, lambda step: {
    'prompts': prompts.batch(step), 'pretrain': text.batch(step),
    'records': [rollout.PromptRow(str(i), i) for i in prompts.indices(step)]}


ALGORITHMS = {'language': (language, ('policy',)), 'reward_model': (reward_model, ('reward',)),
              'dpo': (direct, ('policy',)), 'ppo_ptx': (ppo_ptx, ('policy', 'value'))}


def boxed(role):
  if role == 'policy':
    return lambda k: heads.init_policy_boxed(MODEL, k)
  return lambda k: heads.init_scalar_boxed(MODEL, k, head_init='normal')


def initial(mesh, role, seed):
  return train_state.init_sharded(boxed(role), mesh, RULES, jax.random.key(seed))[0]


def generation_shardings(mesh):
  """The policy's while it samples: whole on every fsdp shard."""
  whole = train_state.abstract_params(boxed('policy'), mesh, {**RULES, 'embed': None})
  return jax.tree.map(lambda x: x.sharding, whole)


def on_devices(mesh, batch):
  put = {k: sharding.put_batch(mesh, v, axis=0 if k == 'prompts' else 1)
         for k, v in batch.items() if k != 'records'}
  return {**put, **{k: v for k, v in batch.items() if k == 'records'}}


class Run(NamedTuple):
  """What was found after each step, and the state after the last, on the host."""

  samples: list
  metrics: list
  state: train_state.TrainState

  def after(self, step):
    return Run(self.samples[step:], self.metrics[step:], self.state)


class Trainer:
  """An algorithm's compiled step on one mesh, and the state that it begins with.

  Attributes:
    target: shapes and shardings of the state.
    initial: parameters of the first role, on the host.
  """

  def __init__(self, name, mesh, **choices):
    make, roles = ALGORITHMS[name]
    self.mesh = mesh
    self.algorithm, self.frozen, self.batch = make(mesh, **choices)
    # With SGD the change of a parameter is its gradient; the rate keeps PPO's ratios moderate.
    optimizers = dict.fromkeys(roles, optax.sgd(0.1))
    params = {role: initial(mesh, role, i) for i, role in enumerate(roles)}
    self.initial = jax.device_get(params[roles[0]])
    self.state = train_state.make_state(
      params, optimizers, ema_roles=roles[:1], mesh=mesh,
      extras={'kl_coef': SETTINGS.kl_coef} if name == 'ppo_ptx' else {})
    self.target = train_state.abstract_of(self.state)
    self.step_fn = loop.compile_step(
      self.algorithm, optimizers, {}, loop.Averaging(0.9, 'update'), self.state, self.frozen, mesh)

  def restored(self, directory):
    """The state after step 1 that some mesh has saved."""
    with Checkpoints(directory, keep_last=1) as checkpoints:
      return saved.load(checkpoints.path(1), self.state)

  def run(self, state, save=None):
    """To STEPS, `state` donated; that after step 1 goes to directory `save`."""
    shardings = train_state.shardings_of(self.target)
    samples, metrics = [], []

    def watch(step, state, found):
      metrics.append({k: float(v) for k, v in compute_metrics(jax.device_get(found)).items()})
      assert train_state.shardings_of(state) == shardings, 'the step moved the state'
      if save is not None and step == 1:
        with Checkpoints(save, keep_last=1) as checkpoints:
          checkpoints.save(step, saved.items_of(state), {})

    def watched_collect(*arguments):
      streams, found = self.algorithm.collect(*arguments)
      if 'episodes' in streams:
        samples.append(jax.device_get(streams['episodes']))
      return streams, found

    state = loop.run(
      self.algorithm._replace(collect=watched_collect), self.step_fn, state, self.frozen,
      lambda step: on_devices(self.mesh, self.batch(step)), STEPS, jax.random.key(9), (watch,))
    return Run(samples, metrics, jax.device_get(state))


@pytest.fixture(scope='module')
def references(tmp_path_factory):
  """On one device, each algorithm once: (trainer, its run, the directory of its checkpoint)."""
  found = {}

  def get(name):
    if name not in found:
      trainer, place = Trainer(name, make_mesh((1, 1, 1))), tmp_path_factory.mktemp(name)
      found[name] = trainer, trainer.run(trainer.state, save=place), place
    return found[name]

  return get


def assert_same(found, reference):
  """Sampled tokens are equal, numbers but for rounding."""
  for a, b in zip(reference.samples, found.samples, strict=True):
    np.testing.assert_array_equal(b.rows.tokens, a.rows.tokens)
    np.testing.assert_array_equal(b.gather.mask, a.gather.mask)
    for field in ('old_logprobs', 'ref_logprobs', 'old_values', 'scores'):
      assert_close(getattr(b, field), getattr(a, field))
  for a, b in zip(reference.metrics, found.metrics, strict=True):
    assert set(a) == set(b)
    for key, value in a.items():
      assert np.isfinite(value), key
      assert_close(b[key], value), key
  leaves = tree.named_leaves(found.state)
  for key, leaf in tree.named_leaves(reference.state).items():
    assert_close(leaves[key], leaf)


# Language models and PPO, which has a scalar head too, are taken everywhere.
@pytest.mark.parametrize(('name', 'shape'), [
  pytest.param(name, shape, marks=() if shape == 'mixed' or name in ('language', 'ppo_ptx')
               else pytest.mark.slow)
  for name in ALGORITHMS for shape in MESHES])
def test_a_step_is_the_same_on_any_mesh(name, shape, references, tmp_path):
  """From the start, and from a checkpoint that another mesh has written, either way."""
  reference, expected, at_1 = references(name)
  trainer = Trainer(name, make_mesh(MESHES[shape]))
  assert_same(trainer.run(trainer.state, save=tmp_path), expected)
  state = expected.state
  after = tree.named_leaves(state.params[ALGORITHMS[name][1][0]])
  for key, leaf in tree.named_leaves(reference.initial).items():
    # A bias adds to both scores of a pair: its gradient is exactly 0.
    assert (leaf != after[key]).any() or key == 'head/bias', f'{key} was not trained'
  assert int(state.bad_step) == -1 and int(state.step) == STEPS
  # 1 -> 8 devices and 8 -> 1.
  assert_same(trainer.run(trainer.restored(at_1)), expected.after(1))
  assert_same(reference.run(reference.restored(tmp_path)), expected.after(1))


def test_episodes_packed_by_length_on_a_mesh_are_those_one_a_row(references):
  _, (_, metrics, state), _ = references('ppo_ptx')
  trainer = Trainer('ppo_ptx', make_mesh(MESHES['mixed']), row_length=20)
  _, packed, other = trainer.run(trainer.state)
  for a, b in zip(metrics, packed, strict=True):
    assert set(a) == set(b)
    assert b['rollout/rows'] < a['rollout/rows']
    for key in a:
      if not key.startswith('rollout/row'):
        assert_close(b[key], a[key])
  found = tree.named_leaves(other)
  for key, leaf in tree.named_leaves(state).items():
    assert_close(found[key], leaf)


def test_ppo_rollouts_are_worth_comparing(references):
  """The reference run of ppo holds what the comparison is about."""
  _, (samples, metrics, _), _ = references('ppo_ptx')
  tokens = [np.asarray(s.rows.tokens) for s in samples]
  assert (tokens[0] != tokens[1]).any()
  assert len({float(m['kl_coef']) for m in metrics}) == STEPS, 'the coefficient did not adapt'
  # Two updates an iteration: the second one's ratios have moved, the first one's are 1.
  assert metrics[0]['policy/log_ratio_max_first'] <= 1e-5 < metrics[0]['policy/log_ratio_max']
  assert metrics[0]['rollout/logprob_gap_max'] <= 1e-5
  assert {'grad_norm/ppo/policy', 'grad_norm/ptx/policy', 'grad_cosine/ppo_ptx', 'reward/length',
          'reward/reward_model', 'ptx/loss'} <= set(metrics[0])


# --- shardings ------------------------------------------------------------------------------------


def specs(role):
  """{parameter path: its PartitionSpec as a list}."""
  shapes = jax.eval_shape(boxed(role), jax.random.key(0))
  found = sharding.param_shardings(shapes, make_mesh((2, 2, 2)), RULES)
  return {name: list(s.spec) for name, s in tree.named_leaves(found).items()}


def test_parameters_are_split_as_the_table_says():
  found = {role: specs(role) for role in ('policy', 'reward')}
  if os.environ.get('UPDATE_GOLDEN'):
    lines = [f'  "{role}": {{\n' + ',\n'.join(
      f'    {json.dumps(k)}: {json.dumps(v)}' for k, v in table.items()) + '\n  }'
      for role, table in found.items()]
    GOLDEN.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
  assert found == json.loads(GOLDEN.read_text(encoding='utf-8'))


def test_optimizer_and_average_take_the_parameters_shardings():
  mesh = make_mesh((2, 2, 2))
  params = {'policy': initial(mesh, 'policy', 0)}
  state = train_state.make_state(
    params, {'policy': optax.adam(1e-3)}, ema_roles=('policy',), extras={'kl_coef': 0.1},
    mesh=mesh)
  want = jax.tree.map(lambda x: x.sharding, params['policy'])
  adam = state.opt_state['policy'][0]
  for found in (state.params['policy'], state.ema['policy'], adam.mu, adam.nu):
    assert jax.tree.map(lambda x: x.sharding, found) == want
  for scalar in (state.step, state.bad_step, adam.count, state.extras['kl_coef']):
    assert scalar.sharding == sharding.replicated(mesh)
  up = state.params['policy']['blocks']['up']['kernel']
  assert up.shape == (1, 32, 64)
  assert {s.data.shape for s in up.addressable_shards} == {(1, 16, 32)}


# --- mistakes -------------------------------------------------------------------------------------


def test_meshes_that_do_not_fit_are_refused():
  assert dict(sharding.make_mesh({'data': -1, 'fsdp': 2, 'tensor': 1}).shape) == {
    'data': 4, 'fsdp': 2, 'tensor': 1}
  with pytest.raises(ValueError, match='needs 6 devices, there are 8'):
    sharding.make_mesh({'data': 3, 'fsdp': 2, 'tensor': 1})
  with pytest.raises(ValueError, match='3 does not divide the 8 devices'):
    sharding.make_mesh({'data': -1, 'fsdp': 3, 'tensor': 1})


@pytest.mark.parametrize(('change', 'message'), [
  ({'width': 'fsdp'}, "unknown logical axis 'width'"),
  ({'embed': 'model'}, "'embed' -> 'model': mesh axes are"),
  ({'head_width': 'tensor'}, r"out.*rules put mesh axis 'tensor' on two of its dimensions")])
def test_rules_that_do_not_fit_are_refused(change, message):
  shapes = jax.eval_shape(boxed('policy'), jax.random.key(0))
  with pytest.raises(ValueError, match=message):
    sharding.param_shardings(shapes, make_mesh((2, 2, 2)), {**RULES, **change})


def test_a_missing_rule_is_refused():
  rules = {k: v for k, v in RULES.items() if k != 'mlp'}
  with pytest.raises(ValueError, match=r"lack \['mlp'\]"):
    sharding.check_rules(rules)


def test_heads_and_vocabulary_that_do_not_divide_name_both_numbers():
  mesh = make_mesh((1, 1, 8))
  for change, message in (
      ({'heads': 4}, "heads has size 4, not divisible by mesh axis 'tensor' of 8"),
      ({'padded_vocab_size': 22}, "vocab has size 22, not divisible by mesh axis 'tensor' of 8")):
    model = dataclasses.replace(MODEL, **change)
    shapes = jax.eval_shape(lambda k, m=model: heads.init_policy_boxed(m, k), jax.random.key(0))
    with pytest.raises(ValueError, match=message):
      sharding.param_shardings(shapes, mesh, RULES)


def test_batches_that_do_not_divide_name_the_nearest_that_do():
  mesh = make_mesh((2, 2, 2))
  sharding.check_divides(12, mesh, 'ppo.batch_size')
  with pytest.raises(ValueError, match=r'ppo.batch_size 10 .* 4 data shards .* use 8 or 12'):
    sharding.check_divides(10, mesh, 'ppo.batch_size')
  with pytest.raises(ValueError, match=r'3 is not divisible by the 4 .* use 4$'):
    sharding.check_divides(3, mesh, 'batch')


def test_a_batch_lands_on_its_shards():
  mesh = make_mesh((2, 2, 2))
  x = np.arange(2 * 8 * 3).reshape(2, 8, 3)
  put = sharding.put_batch(mesh, {'x': x}, axis=1)['x']
  assert {s.data.shape for s in put.addressable_shards} == {(2, 2, 3)}
  np.testing.assert_array_equal(jnp.asarray(put), x)


def test_fsdp_moves_parameters_not_activations():
  """Left alone GSPMD splits activations along the width, as the parameters are, and sums them."""
  mesh, model = make_mesh((1, 8, 1)), dataclasses.replace(MODEL, dropout=0.0)
  params = initial(mesh, 'policy', 0)
  rows = 64  # of 12 tokens, so that activations are much larger than parameters
  batch = jax.tree.map(
    lambda x: np.zeros((rows, 12), np.int32) + np.asarray(x),
    Rows(tokens=1, group=1, branch=0, position=np.arange(12), parent=np.arange(12) - 1))

  def total(params, batch):
    return transformer.hidden_states(model, params, batch).sum()

  compiled = jax.jit(sharding.on_mesh(mesh, jax.grad(total))).lower(
    params, sharding.put_batch(mesh, batch, axis=0)).compile()
  found = collectives.traffic(compiled.as_text())
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  activation = rows * 12 * model.width * 4
  assert activation > 2 * size
  assert sum(t.bytes for t in found.values()) <= 4 * size
