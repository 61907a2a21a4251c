"""Recipes of seconds, and what tests of stages share."""

import functools

import jax
import numpy as np

from configs import quickstart
from instructjax import checkpoint, sharding
from instructjax import config as config_lib
from instructjax.stages.context import make_context


def recipe(arguments='test', **fields):
  """`configs/quickstart.py:test`, smaller still; dotted `fields` are set on it, dots as __."""
  c = quickstart.get_config(arguments)
  c.data.update({
    'documents': 200, 'valid_documents': 24, 'demonstrations': 96, 'valid_demonstrations': 16,
    'ppo_prompts': 32, 'rank_prompts': 16, 'rank_valid_prompts': 8, 'valid_prompts': 16,
    'test_prompts': 16, 'calibration_prompts': 20, 'users': 40})
  for model in (c.models.policy, c.models.reward):
    model.size, model.layers, model.width, model.heads = 'micro', 1, 16, 2
    model.context = 64
  for stage in (c.pretrain, c.sft, c.rl_init):
    stage.batch_size, stage.valid_examples = 16, 16
  for stage in (c.pretrain, c.sft, c.rl_init, c.reward_model):
    stage.optimizer.schedule.warmup_steps = 0
  c.limits.prompt_tokens, c.limits.response_tokens = 40, 24
  c.tracking.tensorboard = False
  for name, value in fields.items():
    *path, last = name.split('__')
    level = c
    for part in path:
      level = level[part]
    if last not in level:
      raise KeyError(f'{name} is no field of the recipe')
    level[last] = value
  return config_lib.lock(c)


def one_device(monkeypatch):
  """Runs stages on the first device: the others cost compile time and show nothing here."""
  monkeypatch.setattr(sharding, 'make_mesh', functools.partial(
    sharding.make_mesh, devices=jax.devices()[:1]))


def context(config, workdir):
  workdir.mkdir(parents=True, exist_ok=True)
  return make_context(config, workdir)


def save_fresh(ctx, path, *, policy_seed=1, reward_seed=2):
  """A checkpoint of fresh networks at `path`/1, for stages that start from one."""
  params = {
    'policy': ctx.fresh('policy', jax.random.key(policy_seed)),
    'reward': ctx.fresh('reward', jax.random.key(reward_seed), head_init='normal')}
  with checkpoint.Checkpoints(path, keep_last=1) as checkpoints:
    checkpoints.save(1, {'params': params}, {})
  return str(path / '1')


def leaves_equal(a, b):
  """Two trees, bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
