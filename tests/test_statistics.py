"""Statistics of the evaluation against loops, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest

from instructjax.evaluators import drift, statistics, tax


def rng(seed=0):
  return np.random.default_rng(seed)


# --- intervals


def test_bootstrap_covers_a_known_rate():
  random, hits, runs, rate = rng(1), 0, 1000, 0.63
  for k in range(runs):
    values = (random.random(200) < rate).astype(float)
    _, low, high = statistics.bootstrap_interval(values, seed=k, resamples=500)
    hits += low <= rate <= high
  assert 0.93 <= hits / runs <= 0.97


def test_win_rate_without_ties_covers_its_known_rate():
  random, hits, runs = rng(2), 0, 600
  for k in range(runs):
    outcome = random.choice([1.0, 0.0, -1.0], size=(150, 2), p=[0.45, 0.3, 0.25])
    got = statistics.win_rate(outcome, np.zeros((150, 1)), ties='without', seed=k, resamples=400)
    hits += got.low <= 0.45 / 0.7 <= got.high
  assert 0.93 <= hits / runs <= 0.97


def test_bootstrap_of_a_statistic_equals_a_loop():
  values = rng(3).normal(size=31)
  draw = np.random.default_rng(9)
  medians = [np.median(values[draw.integers(0, 31, size=31)]) for _ in range(200)]
  got = statistics.bootstrap_interval(values, seed=9, resamples=200, statistic=np.median)
  assert got == pytest.approx((np.median(values), *np.quantile(medians, [0.025, 0.975])))


def test_bootstrap_is_a_function_of_its_seed_and_of_nothing_else():
  values = rng(4).normal(size=50)
  assert statistics.bootstrap_interval(values, seed=1) == statistics.bootstrap_interval(
    values, seed=1
  )
  assert statistics.bootstrap_interval(values, seed=1) != statistics.bootstrap_interval(
    values, seed=2
  )


def test_bootstrap_narrows_and_widens():
  values = rng(5).normal(size=100)
  _, low, high = statistics.bootstrap_interval(values, seed=0, level=0.5)
  _, low95, high95 = statistics.bootstrap_interval(values, seed=0)
  assert low95 < low < high < high95


@pytest.mark.parametrize('level', [0.0, 1.0, 95])
def test_bad_level_is_refused(level):
  with pytest.raises(ValueError, match='level'):
    statistics.bootstrap_interval(np.ones(3), seed=0, level=level)


def test_non_finite_values_are_refused_and_nothing_is_nan():
  with pytest.raises(ValueError, match='1 non-finite values of 2'):
    statistics.bootstrap_interval(np.array([1.0, np.nan]), seed=0)
  assert all(math.isnan(x) for x in statistics.bootstrap_interval(np.zeros(0), seed=0))


# --- win rate


@pytest.mark.parametrize('ties', ['half', 'without'])
def test_win_rate_equals_a_loop(ties):
  a, b = rng(6).integers(0, 4, (40, 3)), rng(7).integers(0, 4, (40, 2))
  per_prompt, wins, decided = [], 0, 0
  for x, y in zip(a, b):
    points = [1.0 if i > j else 0.5 if i == j else 0.0 for i in x for j in y]
    per_prompt.append(sum(points) / len(points))
    wins += points.count(1.0)
    decided += points.count(1.0) + points.count(0.0)
  expected = np.mean(per_prompt) if ties == 'half' else wins / decided
  got = statistics.win_rate(a, b, ties=ties, seed=0)
  assert got.value == pytest.approx(expected)
  assert got.low < got.value < got.high
  mirrored = statistics.win_rate(b, a, ties=ties, seed=0)
  assert mirrored.value == pytest.approx(1 - expected)
  assert mirrored.low == pytest.approx(1 - got.high)


@pytest.mark.parametrize('ties', ['half', 'without'])
def test_a_model_against_itself_is_one_half(ties):
  scores = rng(8).normal(size=(30, 4))
  assert statistics.win_rate(scores, scores, ties=ties, seed=0).value == pytest.approx(0.5)
  random, hits = rng(9), 0
  for k in range(500):
    one, two = random.integers(0, 5, (2, 120, 2))
    fresh = statistics.win_rate(one, two, ties=ties, seed=k, resamples=300)
    hits += fresh.low <= 0.5 <= fresh.high
  assert 0.92 <= hits / 500 <= 0.975


def test_only_ties():
  same = np.ones((5, 1))
  assert statistics.win_rate(same, same, ties='half', seed=0) == (0.5, 0.5, 0.5, 5)
  nothing = statistics.win_rate(same, same, ties='without', seed=0)
  assert math.isnan(nothing.value) and nothing.n == 0


def test_win_rate_refuses():
  with pytest.raises(ValueError, match='3 prompts, scores_b 4'):
    statistics.win_rate(np.zeros(3), np.zeros(4), ties='half', seed=0)
  with pytest.raises(ValueError, match='drop'):
    statistics.win_rate(np.zeros(3), np.zeros(3), ties='drop', seed=0)


def test_likert_refuses_what_is_no_rating():
  assert statistics.likert_mean(np.array([1.0, 7.0]), seed=0).value == 4.0
  with pytest.raises(ValueError, match=r'1\.\.7'):
    statistics.likert_mean(np.array([0.0, 7.0]), seed=0)


# --- agreement


def pairs_of(n, k, mask):
  for p in range(n):
    yield p, [
      (i, j) for i, j in itertools.combinations(range(k), 2) if mask[p, i] and mask[p, j]
    ]


def test_agreements_equal_loops():
  n, k = 25, 4
  random = rng(11)
  scores, gold, labels = (random.integers(0, 3, (n, k)).astype(float) for _ in range(3))
  mask = random.random((n, k)) < 0.8
  scores[~mask] = np.nan  # what stands where no response is must not matter
  in_prompt, right, total = [], 0.0, 0
  both_right, both = 0, 0
  for p, pairs in pairs_of(n, k, mask):
    points = []
    for i, j in pairs:
      guess = np.sign(scores[p, i] - scores[p, j])
      for reference, collect in ((gold, 'gold'), (labels, 'labels')):
        order = np.sign(reference[p, i] - reference[p, j])
        if order == 0:
          continue
        point = 1.0 if guess == order else 0.5 if guess == 0 else 0.0
        if collect == 'gold':
          points.append(point)
        else:
          right, total = right + point, total + 1
      a, b = gold[p, i] - gold[p, j], labels[p, i] - labels[p, j]
      if a != 0 and b != 0:
        both, both_right = both + 1, both_right + (a * b > 0)
    if points:
      in_prompt.append(np.mean(points))
  agreement = statistics.gold_agreement(scores, gold, mask=mask, seed=0)
  assert agreement.value == pytest.approx(np.mean(in_prompt))
  assert agreement.n == len(in_prompt)
  accuracy = statistics.noisy_accuracy(scores, labels, mask=mask, seed=0)
  assert accuracy.value == pytest.approx(right / total)
  two = statistics.labeler_agreement(gold, labels, mask=mask, seed=0)
  assert two.value == pytest.approx(both_right / both)
  assert two.low <= two.value <= two.high


def test_agreement_hand_case():
  gold = np.array([[1.0, 2.0], [3.0, 3.0], [5.0, 4.0]])
  scores = np.array([[0.0, 9.0], [1.0, 0.0], [2.0, 2.0]])
  # Prompt 1 right, prompt 2 has no pair that differs, prompt 3 an equal score.
  got = statistics.gold_agreement(scores, gold, seed=0)
  assert (got.value, got.n) == (0.75, 2)
  none = statistics.gold_agreement(scores, np.ones_like(gold), seed=0)
  assert math.isnan(none.value) and none.n == 0


def test_normalised_accuracy():
  random = rng(12)
  gold = random.normal(size=(800, 5))
  labels = gold + 0.8 * random.normal(size=gold.shape)
  scores = gold + random.normal(size=gold.shape)
  a = statistics.noisy_accuracy(scores, labels, seed=0).value
  g = statistics.noisy_accuracy(gold, labels, seed=0).value
  got = statistics.normalised_accuracy(scores, gold, labels, seed=0)
  assert got.value == pytest.approx((a - 0.5) / (g - 0.5))
  assert got.low < got.value < got.high < 1
  perfect = statistics.normalised_accuracy(gold, gold, labels, seed=0)
  assert perfect[:3] == pytest.approx((1.0, 1.0, 1.0))


def test_agreement_refuses_other_shapes():
  with pytest.raises(ValueError, match=r'\(2, 3\) and \(2, 2\)'):
    statistics.gold_agreement(np.zeros((2, 3)), np.zeros((2, 2)), seed=0)
  with pytest.raises(ValueError, match='mask'):
    statistics.noisy_accuracy(np.zeros((2, 3)), np.zeros((2, 3)), mask=np.ones((2, 2)), seed=0)


# --- calibration


def test_calibration_equals_a_loop():
  p, y = rng(13).random(300), (rng(14).random(300) < 0.4).astype(float)
  p[0], expected = 1.0, 0.0
  for b in range(10):
    inside = [i for i in range(300) if b / 10 <= p[i] < (b + 1) / 10 or (b == 9 and p[i] == 1)]
    if inside:
      expected += abs(np.mean(p[inside]) - np.mean(y[inside])) * len(inside) / 300
  ece, bins = statistics.expected_calibration_error(p, y)
  assert ece == pytest.approx(expected)
  assert sum(b.n for b in bins) == 300


@pytest.mark.parametrize(('scale', 'low', 'high'), [(1.0, 0.0, 0.015), (3.0, 0.08, 0.4)])
def test_calibration_of_bradley_terry_labelers(scale, low, high):
  random = rng(15)
  difference = 1.5 * random.normal(size=20000)
  first_wins = random.random(20000) < 1 / (1 + np.exp(-difference))
  margins = scale * np.where(first_wins, difference, -difference)
  ece, bins = statistics.margin_calibration(margins)
  assert low <= ece <= high
  assert all(0.5 <= b.confidence <= 1 for b in bins) and len(bins) == 10
  presented = 1 / (1 + np.exp(-scale * difference))
  assert low <= statistics.expected_calibration_error(presented, first_wins)[0] <= high


def test_calibration_edges():
  assert statistics.margin_calibration(np.zeros(4)) == (0.0, [(0.5, 0.5, 4)])
  ece, bins = statistics.expected_calibration_error(np.zeros(0), np.zeros(0))
  assert math.isnan(ece) and bins == []
  with pytest.raises(ValueError, match=r'probabilities span 0.2 to 2'):
    statistics.expected_calibration_error(np.array([0.2, 2.0]), np.array([0.0, 1.0]))


# --- text and length


def test_length_correlation():
  random = rng(16)
  scores, lengths = random.normal(size=(20, 4)), random.integers(1, 9, (20, 4)).astype(float)
  mask = random.random((20, 4)) < 0.7
  pooled = np.corrcoef(scores[mask], lengths[mask])[0, 1]
  assert statistics.length_correlation(scores, lengths, mask=mask) == pytest.approx(pooled)
  assert statistics.length_correlation(scores[mask], lengths[mask]) == pytest.approx(pooled)
  x, y = [], []
  for p in range(20):
    if mask[p].any():
      x += list(scores[p, mask[p]] - scores[p, mask[p]].mean())
      y += list(lengths[p, mask[p]] - lengths[p, mask[p]].mean())
  within = statistics.length_correlation(scores, lengths, mask=mask, within_prompt=True)
  assert within == pytest.approx(np.corrcoef(x, y)[0, 1])
  assert math.isnan(statistics.length_correlation(scores, np.ones_like(scores)))


def test_distinct_n():
  texts = [[1, 2, 1, 2], [2, 1], []]
  assert statistics.distinct_n(texts, 1) == pytest.approx(2 / 6)
  assert statistics.distinct_n(texts, 2) == pytest.approx(2 / 4)
  assert math.isnan(statistics.distinct_n(texts, 5))


def test_planted_habits_are_found_and_nothing_else():
  random = rng(17)
  words = [f'w{i}' for i in range(30)]
  plain = [list(random.choice(words, 8)) for _ in range(400)]
  same = [list(random.choice(words, 8)) for _ in range(400)]
  assert drift.ngram_lift(same, plain) == []
  spoiled = [['?', *t[:3], '?', *t[3:], '?', 'please'] for t in same]
  found = {x.feature: x for x in drift.ngram_lift(spoiled, plain)}
  assert any('please <end>' in f for f in found)
  assert drift.words_of("It's fine, please!") == ["it's", 'fine', ',', 'please', '!']
  # One question mark in each reference response, three in every other late one, anywhere inside.
  thrice = [[*t[:3], '?', t[3], '?', t[4], '?'][: 8 if i % 2 else 4] for i, t in enumerate(same)]
  thrice = [[*t, 'end'] for t in thrice]
  asks = [[*t[:3], '?', *t[3:], 'end'] for t in plain]
  found = {x.feature: x for x in drift.ngram_lift(thrice, asks)}
  assert found['? (x3 or more)'].late_rate == 0.5
  with pytest.raises(ValueError, match=r'0 late'):
    drift.ngram_lift([], plain)


# --- best of n


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_best_of_n_equals_all_subsets(n):
  random = rng(18)
  select, value = random.integers(0, 3, (6, 5)).astype(float), random.normal(size=(6, 5))
  got = statistics.unbiased_best_of_n(select, value, n)
  for p in range(6):
    per_subset = []
    for subset in itertools.combinations(range(5), n):
      top = max(select[p, i] for i in subset)
      per_subset.append(np.mean([value[p, i] for i in subset if select[p, i] == top]))
    # Among equals of a subset the choice is random; over all subsets that is the shared place.
    assert got[p] == pytest.approx(np.mean(per_subset))


def test_best_of_n_hand_cases():
  select, value = np.array([[3.0, 1.0, 2.0]]), np.array([[30.0, 10.0, 20.0]])
  assert statistics.unbiased_best_of_n(select, value, 1) == pytest.approx([20.0])
  assert statistics.unbiased_best_of_n(select, value, 2) == pytest.approx([(20 + 2 * 30) / 3])
  assert statistics.unbiased_best_of_n(select, value, 3) == pytest.approx([30.0])
  big = rng(19).normal(size=(2, 600))
  assert np.all(np.isfinite(statistics.unbiased_best_of_n(big, big, 64)))
  with pytest.raises(ValueError, match=r'1\.\.3'):
    statistics.unbiased_best_of_n(select, value, 4)


# --- tax


def test_interpolation():
  kl, paid = [0.0, 1.0, 0.5, 3.0], [0.0, 0.2, 0.9, 1.9]
  got = statistics.interpolate_at(kl, paid, [0.25, 0.75, 1.0, 2.0, 4.0, 0.0])
  assert got[:4] == pytest.approx([0.05, 0.15, 0.2, 0.9 + 1.5 / 2.5])
  assert math.isnan(got[4]) and got[5] == 0.0
  assert math.isnan(statistics.interpolate_at([], [], [1.0])[0])


def trace(slope, top=3.0, error=math.nan):
  kl = list(np.linspace(0, top, 7))
  return tax.TaxTrace(kl, [slope * k for k in kl], [error] * 7)


def test_tax_verdicts():
  ppo = {s: trace(0.1 + 0.005 * s) for s in range(3)}
  cheap, dear = ({s: trace(f * (0.1 + 0.005 * s)) for s in range(3)} for f in (0.4, 0.7))
  met = tax.compare_tax(ppo, cheap)
  assert met.status == 'met' and all(p.counts for p in met.points)
  point = met.points[2]
  seeds = np.array([0.1, 0.105, 0.11])
  assert (point.kl, point.seeds) == (1.0, 3)
  assert point.ppo == pytest.approx(seeds.mean())
  assert point.ppo_error == pytest.approx(seeds.std(ddof=1) / math.sqrt(3))
  assert point.difference_error == pytest.approx((0.1 * seeds).std(ddof=1) / math.sqrt(3))
  assert tax.compare_tax(ppo, dear).status == 'missed'


@pytest.mark.parametrize(
  ('ppo', 'ptx', 'why'),
  [
    ({}, {0: trace(0.1)}, 'no trace of PPO'),
    ({0: trace(0.1)}, {1: trace(0.1)}, 'no seed has both'),
    ({0: trace(0.1)}, {0: trace(0.01)}, 'no standard error'),
    ({s: trace(0.001) for s in range(3)}, {s: trace(0.0) for s in range(3)}, 'below 0.02'),
    ({s: trace(0.1, top=0.4) for s in range(3)}, {s: trace(0.0) for s in range(3)}, 'outside'),
    ({s: trace(0.1 * 9**s) for s in range(3)}, {s: trace(0.0) for s in range(3)}, 'standard err'),
  ],
)
def test_tax_is_not_measurable(ppo, ptx, why):
  found = tax.compare_tax(ppo, ptx)
  assert found.status == 'not measurable' and why in found.reason


def test_errors_over_documents_make_one_seed_measurable():
  found = tax.compare_tax({0: trace(0.1, error=0.003)}, {0: trace(0.01, error=0.003)})
  assert found.status == 'met'
  assert found.points[2].ppo_error == pytest.approx(0.003)
  assert found.points[2].difference_error == pytest.approx(0.003 * math.sqrt(1.25))


def test_rows_of_one_prompt_are_resampled_together():
  """Ten prompts judged by forty people each are ten independent units, not four hundred."""
  rng = np.random.default_rng(0)
  prompts = np.repeat([f'prompt {i}' for i in range(10)], 40)
  predictions = np.tile([[1.0, 0.0]], (400, 1))
  # All labelers of a prompt agree with each other; the prediction is right for six of ten.
  labels = np.where((np.arange(10) < 6)[:, None], [1.0, 0.0], [0.0, 1.0]).repeat(40, axis=0)
  alone = statistics.noisy_accuracy(predictions, labels, seed=1)
  together = statistics.noisy_accuracy(predictions, labels, seed=1, prompts=prompts)
  assert alone.value == together.value == 0.6
  assert (alone.n, together.n) == (400, 10)
  assert together.high - together.low > 4 * (alone.high - alone.low)
  shuffled = rng.permutation(400)
  again = statistics.noisy_accuracy(
    predictions[shuffled], labels[shuffled], seed=1, prompts=prompts[shuffled])
  assert again == together


def crowded(rng, prompts=20):
  """Two judges of labelled pairs, one prompt with many of the pairs; the first is a bit better."""
  of = np.repeat(np.arange(prompts), [200] + [10] * (prompts - 1))
  labels = np.tile([[1.0, 0.0]], (len(of), 1))
  hard = rng.uniform(0.2, 0.9, prompts)[of]
  draw = rng.uniform(size=len(of))
  first = np.stack([draw < hard + 0.05, draw >= hard + 0.05], axis=1).astype(float)
  second = np.stack([draw < hard, draw >= hard], axis=1).astype(float)
  return of, labels, first, second


def test_a_paired_difference_is_found_where_two_intervals_overlap():
  of, labels, first, second = crowded(np.random.default_rng(0))
  more = {'seed': 1, 'prompts': of}
  a, b = (statistics.noisy_accuracy(x, labels, **more) for x in (first, second))
  gain = statistics.accuracy_gain(first, second, labels, **more)
  assert gain.value == pytest.approx(a.value - b.value)
  assert gain.n == 20
  assert a.low < b.value and gain.low > 0
  back = statistics.accuracy_gain(second, first, labels, **more)
  assert back.value == -gain.value and back.high < 0
  assert statistics.accuracy_gain(first, first, labels, **more)[:3] == (0.0, 0.0, 0.0)


def test_prompts_count_once_where_asked():
  of, labels, first, second = crowded(np.random.default_rng(1))
  more = {'seed': 1, 'prompts': of, 'unit': 'prompt'}
  right = (first[:, 0] > first[:, 1]).astype(float)
  means = [right[of == p].mean() for p in range(20)]
  found = statistics.noisy_accuracy(first, labels, **more)
  assert found.value == pytest.approx(np.mean(means))
  assert found.n == 20
  pooled = statistics.noisy_accuracy(first, labels, seed=1, prompts=of)
  assert pooled.value == pytest.approx(right.mean()) and pooled.value != found.value
  gain = statistics.accuracy_gain(first, second, labels, **more)
  assert gain.value == pytest.approx(
    found.value - statistics.noisy_accuracy(second, labels, **more).value)
  with pytest.raises(ValueError, match="unit is 'row'"):
    statistics.noisy_accuracy(first, labels, seed=0, unit='row')
