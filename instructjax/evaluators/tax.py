"""The alignment tax of PPO and PPO-ptx compared at equal distance from the reference.

Tax: held-out pretraining loss minus that of the shared start, same documents, in nats a token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from instructjax.evaluators.statistics import interpolate_at

KL_POINTS = (0.25, 0.5, 1.0, 2.0)


class TaxTrace(NamedTuple):
  """(KL, tax) along one run: nats a response, nats a token, and the tax's standard error or nan."""

  kl: list[float]
  tax: list[float]
  error: list[float]


class TaxPoint(NamedTuple):
  """Both arms at one KL, in the mean of the seeds that reach it in both; nan where none does."""

  kl: float
  seeds: int
  ppo: float
  ppo_error: float
  ppo_ptx: float
  difference: float
  difference_error: float
  counts: bool
  met: bool
  note: str


class TaxVerdict(NamedTuple):
  """status is 'met', 'missed' or 'not measurable'."""

  status: str
  reason: str
  points: list[TaxPoint]


def _standard_error(values: np.ndarray, own: np.ndarray) -> float:
  """Of a mean over seeds: the larger of the seeds' spread and their own documents' errors."""
  n = len(values)
  spread = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
  known = own[np.isfinite(own)]
  inner = math.sqrt(float(np.sum(known**2))) / n if len(known) == n else math.nan
  return float(np.fmax(spread, inner))


def _at(traces: Mapping[int, TaxTrace], seeds: list[int], points: Sequence[float]):
  tax = np.array([interpolate_at(traces[s].kl, traces[s].tax, points) for s in seeds])
  error = np.array(
    [
      interpolate_at(t.kl, t.error, points)
      if np.all(np.isfinite(t.error))
      else np.full(len(points), math.nan)
      for t in (traces[s] for s in seeds)
    ]
  )
  return tax, error


def _point(kl: float, a: np.ndarray, ea: np.ndarray, b: np.ndarray, eb: np.ndarray, least, errors):
  """`a` plain PPO and `b` PPO-ptx at this KL, one entry per seed that reaches it in both."""
  n = len(a)
  nan = math.nan
  if n == 0:
    return TaxPoint(kl, 0, nan, nan, nan, nan, nan, False, False, 'outside the range of an arm')
  ppo, ptx = float(a.mean()), float(b.mean())
  ppo_error = _standard_error(a, ea)
  difference_error = _standard_error(b - a / 2, np.sqrt(eb**2 + ea**2 / 4))
  if not math.isfinite(ppo_error):
    note, counts = 'one seed and no errors over documents: no standard error', False
  elif ppo < least:
    note, counts = f"PPO's tax is below {least:g}", False
  elif ppo < errors * ppo_error:
    note, counts = f"PPO's tax is below {errors:g} of its standard errors", False
  else:
    note, counts = 'counts', True
  met = counts and ptx <= ppo / 2
  return TaxPoint(kl, n, ppo, ppo_error, ptx, ptx - ppo / 2, difference_error, counts, met, note)


def compare_tax(
  ppo: Mapping[int, TaxTrace],
  ppo_ptx: Mapping[int, TaxTrace],
  *,
  points: Sequence[float] = KL_POINTS,
  least_tax: float = 0.02,
  least_errors: float = 3.0,
) -> TaxVerdict:
  """Is PPO-ptx's tax at most half of PPO's at each KL where PPO's is large enough to be seen?

  Each seed's trace is interpolated linearly at `points` where they lie inside the range of both its
  arms. A point counts where PPO's tax, in the mean over those seeds, is at least `least_tax` and
  `least_errors` standard errors. `difference` is PPO-ptx's tax minus half of PPO's, paired by seed.
  With fewer than two points that count the answer is 'not measurable', with the reason.

  Args:
    ppo: Trace by seed, ptx_coef 0.
    ppo_ptx: Trace by seed, ptx_coef > 0.
  """
  seeds = sorted(set(ppo) & set(ppo_ptx))
  if not seeds:
    missing = [name for name, arm in (('PPO', ppo), ('PPO-ptx', ppo_ptx)) if not arm]
    why = f"no trace of {' and '.join(missing)}" if missing else 'no seed has both arms'
    return TaxVerdict('not measurable', why, [])
  a, ea = _at(ppo, seeds, points)
  b, eb = _at(ppo_ptx, seeds, points)
  found = []
  for k, kl in enumerate(points):
    inside = np.isfinite(a[:, k]) & np.isfinite(b[:, k])
    columns = (x[inside, k] for x in (a, ea, b, eb))
    found.append(_point(float(kl), *columns, least_tax, least_errors))
  counting = [p for p in found if p.counts]
  if len(counting) < 2:
    why = '; '.join(f'KL {p.kl:g}: {p.note}' for p in found if not p.counts)
    return TaxVerdict('not measurable', f'{len(counting)} of 2 needed points count ({why})', found)
  missed = [p for p in counting if not p.met]
  if missed:
    where = ', '.join(f'{p.ppo_ptx:+.3f} of {p.ppo:+.3f} at KL {p.kl:g}' for p in missed)
    return TaxVerdict('missed', f"PPO-ptx pays more than half of PPO's tax: {where}", found)
  where = ', '.join(f'{p.kl:g}' for p in counting)
  return TaxVerdict('met', f"PPO-ptx pays at most half of PPO's tax at KL {where}", found)
