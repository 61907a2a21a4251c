"""Which curves belong to which kind of stage."""

from collections.abc import Sequence
from typing import NamedTuple

from instructjax.evaluators import page, plots, sections
from instructjax.evaluators.evidence import Evidence
from instructjax.evaluators.run_files import StageFiles
from instructjax.evaluators.verdict import stage_kind


class Panel(NamedTuple):
  """One plot: its series as (label, metric, split)."""

  name: str
  title: str
  ylabel: str
  series: Sequence[tuple[str, str, str]]
  logarithmic: bool = False
  share: bool = False


_LANGUAGE = (
  Panel(
    'loss',
    'Loss',
    'nats a token',
    (('training', 'language/loss', 'train'), ('held out', 'language/loss', 'valid')),
  ),
  Panel(
    'pretraining',
    'Held-out pretraining loss',
    'nats a token',
    (('held out', 'pretrain/loss', 'valid'),),
  ),
)
_CANDIDATES = (
  Panel('gold', 'Gold score of the candidates', 'Likert', (('gold', 'gold', 'valid'),)),
  Panel('score', 'Reward-model score of the candidates', 'score', (('score', 'score', 'valid'),)),
)
PANELS: dict[str, tuple[Panel, ...]] = {
  'pretrain': _LANGUAGE[:1],
  'sft': _LANGUAGE,
  'rl_init': _LANGUAGE,
  'language': _LANGUAGE,
  'dpo': (
    Panel(
      'loss',
      'DPO loss',
      'nats a pair',
      (('training', 'dpo/loss', 'train'), ('held out', 'dpo/loss', 'valid')),
    ),
    Panel(
      'accuracy',
      'Pairs ordered as the labeler',
      '%',
      (('training', 'ranking/accuracy', 'train'), ('held out', 'ranking/accuracy', 'valid')),
      share=True,
    ),
    Panel(
      'rewards',
      'Implicit rewards',
      'beta x nats',
      (
        ('chosen, held out', 'dpo/chosen_reward', 'valid'),
        ('rejected, held out', 'dpo/rejected_reward', 'valid'),
      ),
    ),
  ),
  'collect': (),
  'select': _CANDIDATES,
  'evaluate': (),
  'reward_model': (
    Panel(
      'loss',
      'Ranking loss',
      'nats a pair',
      (('training', 'ranking/loss', 'train'), ('held out', 'ranking/log_loss', 'valid')),
    ),
    Panel(
      'accuracy',
      'Pairs ordered as the labeler',
      '%',
      (('training', 'ranking/accuracy', 'train'), ('held out', 'ranking/accuracy', 'valid')),
      share=True,
    ),
  ),
  'ppo': (
    Panel(
      'reward',
      'Reward-model score',
      'score',
      (('rollouts', 'rollout/score', 'train'), ('held out', 'score', 'valid')),
    ),
    Panel('gold', 'Gold score', 'Likert', (('held out', 'gold', 'valid'),)),
    Panel(
      'kl',
      'KL to the reference',
      'nats a response',
      (
        ('rollouts (k1)', 'rollout/kl', 'train'),
        ('rollouts (k3)', 'rollout/kl_k3', 'train'),
        ('held out (exact)', 'kl', 'valid'),
      ),
    ),
    Panel('entropy', 'Entropy', 'nats a token', (('rollouts', 'rollout/entropy', 'train'),)),
    Panel(
      'clip',
      'Clipped',
      '% of tokens',
      (
        ('policy', 'policy/clip_fraction', 'train'),
        ('value', 'value/clip_fraction', 'train'),
      ),
      share=True,
    ),
    Panel('length', 'Response length', 'tokens', (('rollouts', 'rollout/length', 'train'),)),
    Panel(
      'ends',
      'Responses with end-of-text',
      '%',
      (('rollouts', 'rollout/end_rate', 'train'),),
      share=True,
    ),
    Panel(
      'explained',
      'Explained variance of returns',
      'share',
      (('value network', 'value/explained_variance', 'train'),),
    ),
    Panel(
      'losses',
      'Value loss',
      'squared score units',
      (('value', 'value/loss', 'train'),),
    ),
    Panel('ptx', 'Pretraining term', 'nats a token', (('ptx', 'ptx/loss', 'train'),)),
    Panel(
      'pretraining',
      'Held-out pretraining loss',
      'nats a token',
      (('held out', 'pretrain/loss', 'valid'),),
    ),
    Panel(
      'gap',
      'Sampler against trainer, log-prob gap',
      'nats a token',
      (
        ('mean', 'rollout/logprob_gap_mean', 'train'),
        ('largest', 'rollout/logprob_gap_max', 'train'),
      ),
      logarithmic=True,
    ),
  ),
}


def _logged(stage: StageFiles, kind: str | None) -> list[dict]:
  """What the panels read: the metrics, or what `select` measured of each candidate."""
  if kind != 'select':
    return stage.metrics
  return [{**c, 'split': 'valid'} for c in stage.summary.get('candidates', [])]


def stage_figures(stage: StageFiles) -> list:
  """The plots of a stage, and one line that names those without data."""
  kind = stage_kind(stage.stage, stage.kind)
  panels = () if kind is None else PANELS[kind]
  evidence = Evidence(stage.stage, _logged(stage, kind), stage.summary, [])
  made, missing = [], []
  for panel in panels:
    series = {}
    for label, metric, split in panel.series:
      steps, values = evidence.series(metric, split)
      if len(values):
        series[label] = (steps, values, split == 'valid')
    if not series:
      missing.append(panel.title.lower())
      continue
    lines = {}
    unigram = evidence.number('unigram_loss')
    if kind == 'pretrain' and panel.name == 'loss' and unigram is not None:
      lines = {'unigram': unigram}
    name = page.anchor(f'{stage.stage}-{panel.name}')
    svg = plots.curves(
      name,
      panel.title,
      panel.ylabel,
      series,
      logarithmic=panel.logarithmic,
      lines=lines,
      share=panel.share,
    )
    made.append((name, f'{panel.title} of stage {stage.stage}', svg))
  if kind == 'reward_model' and stage.summary.get('calibration'):
    name = page.anchor(f'{stage.stage}-calibration')
    svg = plots.calibration(name, 'Calibration on held-out pairs', stage.summary['calibration'])
    made.append((name, 'Calibration of the reward model', svg))
  elif kind == 'reward_model':
    missing.append('calibration')
  made += _tax_figure(stage) if kind == 'ppo' else []
  blocks: list = [page.Figures(made)] if made else []
  if missing:
    blocks.append(page.Text(f"Not recorded, so not drawn: {', '.join(missing)}.", True))
  return blocks


def _tax_figure(stage: StageFiles) -> list:
  kl, tax, _, _ = sections.tax_trace(stage)
  if len(kl) < 2:
    return []
  name = page.anchor(f'{stage.stage}-tax')
  svg = plots.frontier(
    name,
    'Alignment tax against KL',
    'KL to the reference, nats a response',
    'tax, nats a token',
    {stage.stage: [(kl, tax)]},
    (),
    small=True,
  )
  return [(name, f'Tax against KL of stage {stage.stage}', svg)]
