"""What is said of a reward model on held-out rankings."""

import numpy as np
import pytest

from instructjax.evaluators import rankings


def ranked(scores, better, length, mask=None):
  """RankedScores from lists; `better` holds (prompt, preferred, other)."""
  scores = np.array(scores, np.float32)
  labels = np.zeros((*scores.shape, scores.shape[1]), np.float32)
  for prompt, i, j in better:
    labels[prompt, i, j] = 1.0
  present = np.ones(scores.shape, bool) if mask is None else np.array(mask, bool)
  return rankings.RankedScores(scores, present, labels, np.array(length, np.int32))


# Three rankings of two prompts: 0 and 1 share one. The scores order 5 of 6 pairs rightly, the
# length 2 (so that the shorter one is the rule to beat, with 4), the earlier place 4.
RANKED = ranked(
  scores=[[3.0, 2.0, 1.0], [3.0, 2.0, 0.0], [1.0, 2.0, 0.0]],
  better=[(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1), (2, 1, 0), (2, 2, 0)],
  length=[[4, 5, 6], [5, 4, 0], [6, 5, 7]],
  mask=[[1, 1, 1], [1, 1, 0], [1, 1, 1]])
PROMPTS = ['a', 'a', 'b']


def rows(found):
  return {r['metric']: r for r in found}


def test_accuracies_and_gains_over_rules_by_pair_and_by_prompt():
  found = rows(rankings.accuracy_rows(RANKED, PROMPTS, seed=0))
  # Prompt a: 4 of 4 by score, 1 by length, 4 by place; prompt b: 1 of 2, 1 of 2, 0 of 2.
  expected = {
    'ranking_accuracy': 5 / 6, 'valid_longer_accuracy': 2 / 6,
    'accuracy_gain_over_longer': 5 / 6 - 4 / 6, 'valid_first_position_accuracy': 4 / 6,
    'accuracy_gain_over_first_position': 5 / 6 - 4 / 6,
    'ranking_accuracy_by_prompt': (1 + 1 / 2) / 2,
    'valid_longer_accuracy_by_prompt': (1 / 4 + 1 / 2) / 2,
    'accuracy_gain_over_longer_by_prompt': 3 / 4 - 5 / 8,
    'valid_first_position_accuracy_by_prompt': 1 / 2,
    'accuracy_gain_over_first_position_by_prompt': 3 / 4 - 1 / 2}
  assert {k: r['value'] for k, r in found.items()} == pytest.approx(expected)
  assert {r['n'] for r in found.values()} == {2}
  assert {r['model'] for r in found.values()} == {'reward_model'}


def many(right, longer_right, prompts=150):
  """Two responses a prompt, the first preferred; so many right by score, and by length."""
  first = lambda good: np.arange(prompts) < good  # noqa: E731
  scores = np.where(first(right)[:, None], [1.0, 0.0], [0.0, 1.0])
  length = np.where(first(longer_right)[:, None], [9, 5], [5, 9])
  return scores, length


@pytest.mark.parametrize(
  ('right', 'longer', 'verdict'), [(120, 80, 'above'), (80, 120, 'below'), (91, 89, 'equal')])
def test_a_source_is_above_equal_or_below_the_longer_response(right, longer, verdict):
  scores, length = many(right, longer)
  few_scores, few_length = many(40, 40, prompts=50)
  total = ranked(np.concatenate([scores, few_scores]), [(p, 0, 1) for p in range(200)],
                 np.concatenate([length, few_length]))
  sources = ['many'] * 150 + ['few'] * 50
  found = rankings.by_source(total, sources, [str(i) for i in range(200)], seed=0)
  # A source with fewer than 100 pairs is only part of the pool.
  assert [f['source'] for f in found] == ['all sources', 'many']
  assert found[0]['pairs'] == 200 and found[0]['accuracy'] == (right + 40) / 200
  assert found[1]['verdict'] == verdict
  assert found[1]['accuracy'] == right / 150 and found[1]['longer'] == longer / 150
  difference = (right - longer) / 150
  assert found[1]['difference_low'] < difference < found[1]['difference_high']


def test_report_is_the_sum_over_pairs():
  numbers, _ = rankings.ranking_report(RANKED)
  gaps = [RANKED.scores[p, i] - RANKED.scores[p, j] for p, i, j in np.argwhere(RANKED.better > 0)]
  assert numbers['ranking/accuracy'] == pytest.approx(np.mean([g > 0 for g in gaps]))
  assert numbers['ranking/log_loss'] == pytest.approx(np.mean([np.log1p(np.exp(-g)) for g in gaps]))
  assert numbers['ranking/longer_accuracy'] == pytest.approx(2 / 6)
  assert numbers['ranking/first_position_accuracy'] == pytest.approx(4 / 6)
