"""Which stage is wrong? The named checks of each kind of stage.

`judge_stage` looks at what a stage left behind and gives one line per check: what was expected,
what was seen, pass, warn, fail or absent, and where to look. The ranges are those of healthy runs,
and a warning is a reason to look, not an error.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from instructjax.evaluators import checks, checks_ppo
from instructjax.evaluators.evidence import ABSENT, FAIL, PASS, WARN, Check, Evidence

_LANGUAGE = (checks.complete, checks.finite_metrics, checks.loss_falls)

CHECKS: dict[str, tuple[Callable[[Evidence], Check], ...]] = {
  'pretrain': (*_LANGUAGE, checks.below_unigram),
  'sft': (*_LANGUAGE, checks.valid_loss_falls, checks.sft_improves),
  'rl_init': (*_LANGUAGE, checks.start_tax),
  'collect': (checks.complete, checks.labelers_agree),
  'reward_model': (
    checks.complete,
    checks.finite_metrics,
    checks.ranking_loss_below_chance,
    checks.beats_length,
    checks.beats_position,
    checks.calibrated,
    checks.not_overfitted,
    checks.score_not_length,
    checks.agrees_with_gold,
  ),
  'select': (checks.complete,),
  'ppo': (
    checks.complete,
    checks.finite_metrics,
    checks_ppo.ratio_one,
    checks_ppo.kl_starts_at_zero,
    checks_ppo.sampler_matches,
    checks_ppo.value_explains,
    checks_ppo.clip_fraction_in_range,
    checks_ppo.entropy_kept,
    checks_ppo.length_kept,
    checks_ppo.responses_end,
    checks_ppo.reward_rises,
    checks_ppo.not_overoptimised,
    checks_ppo.not_hacked,
    checks_ppo.kl_within_budget,
    checks_ppo.pretraining_kept,
    checks_ppo.terms_not_opposed,
  ),
  # Kinds whose stages may have any name; the others go by their names.
  'language': _LANGUAGE,
  'dpo': (
    checks.complete,
    checks.finite_metrics,
    checks.preference_loss_below_chance,
    checks.preferences_ordered,
  ),
  'evaluate': (
    checks.complete,
    checks.policy_beats_baseline,
    checks.judges_agree,
    checks.final_tax,
    checks.same_length,
    checks.still_diverse,
  ),
}


def stage_kind(stage: str, kind: str | None = None) -> str | None:
  """Kind of a stage by its name: `ppo_plain` is a `ppo`, `sft_large` an `sft`.

  A name that tells nothing leaves it to the `kind` of the stage's config; None if that is unknown.
  """
  fitting = [k for k in CHECKS if stage == k or stage.startswith(k + '_')]
  if fitting:
    return max(fitting, key=len)
  return kind if kind in CHECKS else None


def judge_stage(
  stage: str,
  metrics: Sequence[dict[str, Any]],
  summary: dict[str, Any],
  rows: Sequence[dict[str, Any]],
  kind: str | None = None,
) -> list[Check]:
  """The checks of one stage.

  Args:
    stage: Its name; what is checked depends on `stage_kind`.
    metrics: Objects of metrics.jsonl, each with `step` and `split`.
    summary: summary.json, {} where there is none.
    rows: Long-form rows of all stages of the run, since some checks need the evaluation.
    kind: Of the stage's config, for a name that does not tell.

  Returns:
    One Check per line, in the order to read them; empty for a kind without checks.
  """
  kind = stage_kind(stage, kind)
  if kind is None:
    return []
  evidence = Evidence(stage, metrics, summary, rows)
  if kind == 'evaluate' and summary.get('models_only'):
    # The checks are about the recipe's policy, which another evaluation judges.
    return [checks.complete(evidence)]
  return [check(evidence) for check in CHECKS[kind]]


def stage_status(found: Sequence[Check]) -> str:
  """The worst of a stage's checks; 'absent' if nothing but absences."""
  counts = Counter(c.status for c in found)
  for status in (FAIL, WARN, PASS):
    if counts[status]:
      return status
  return ABSENT


def first_suspect(found: Sequence[Check]) -> Check | None:
  """Where to look first: the earliest failure of the run, else the earliest warning."""
  for status in (FAIL, WARN):
    for check in found:
      if check.status == status:
        return check
  return None
