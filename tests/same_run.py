"""Whether two runs made the same updates but for rounding: metrics of each step, and parameters."""

import jax
import numpy as np
import recipe_of_updates

from instructjax import hooks, stored

# Rows are as many as divide over the devices.
LAYOUT = ('rollout/rows', 'rollout/row_slots', 'rollout/row_utilisation')
# What shows that a stage was fed; what ppo is fed includes what it samples.
STREAMS = {'sft': 'examples', 'reward_model': 'rankings', 'dpo': 'preferences', 'ppo': 'episodes'}


def close(a, b, what):
  """The tolerance of float32: 1e-5 of the largest, or of 1."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape, what
  scale = max(1.0, np.abs(b).max(initial=0.0))
  assert np.abs(a - b).max(initial=0.0) <= 1e-5 * scale, (what, np.abs(a - b).max(), scale)


def assert_same_updates(
    found, reference, stages=recipe_of_updates.STAGES, steps=recipe_of_updates.STEPS):
  """Metrics of each step and the parameters after the last."""
  for stage in stages:
    ours, theirs = (
      {(r['step'], r['split']): hooks.without_wall_clock(r)
       for r in hooks.read_metrics(place / stage / 'metrics.jsonl')}
      for place in (found, reference))
    assert list(ours) == list(theirs) and (steps, 'train') in ours
    for key, row in theirs.items():
      assert set(ours[key]) == set(row)
      for name, value in row.items():
        if name != 'split' and not name.startswith(LAYOUT) and not np.isnan(value):
          close(ours[key][name], value, f'{stage} {key} {name}')
    path = f'{stage}/checkpoints/{steps}'
    a, b = (load_all(place / path, 'params') for place in (found, reference))
    for name in b:
      close(a[name], b[name], f'{stage} {name}')


def load_all(path, item):
  """Every array of an item by name, on the first device."""
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {}
  for name, (shape, dtype) in stored.describe(path, item).items():
    *roles, last = name.split('/')
    level = target
    for role in roles:
      level = level.setdefault(role, {})
    level[last] = jax.ShapeDtypeStruct(shape, dtype, sharding=one)
  loaded = stored.load_item(path, item, target)
  return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(loaded)}
