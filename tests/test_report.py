"""The report of a fabricated run: files, their forms, and what it says about missing parts."""

import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from instructjax import report
from instructjax.evaluators import page
from instructjax.evaluators.run_files import ROW_FIELDS, find_setting, find_stages, read_stage

STAGES = (
  'pretrain',
  'sft',
  'rl_init',
  'collect',
  'reward_model',
  'select',
  'ppo',
  'evaluate',
)


def row(stage, metric, value, low=None, high=None, *, model=None, baseline=None, judge=None):
  values = (stage, metric, model, baseline, judge, value, low, high, 1000, None)
  return dict(zip(ROW_FIELDS, values, strict=True))


def leave(workdir, stage, *, metrics=(), rows=(), samples=(), **summary):
  folder = workdir / stage
  folder.mkdir(parents=True)
  for name, objects in (('metrics.jsonl', metrics), ('samples.jsonl', samples)):
    (folder / name).write_text(''.join(json.dumps(o) + '\n' for o in objects), encoding='utf-8')
  (folder / 'rows.json').write_text(json.dumps(list(rows)))
  whole = {'complete': True, 'seconds': 61.0, 'steps': 200, 'checkpoint': 'checkpoints/200'}
  (folder / 'summary.json').write_text(json.dumps({**whole, **summary}))
  (folder / 'environment.json').write_text(json.dumps({'jax': '0.10.2', 'git': 'abc123'}))


def language(rng, start, end, steps, every):
  fall = lambda t: end + (start - end) * np.exp(-4 * t / steps)  # noqa: E731
  train = [
    {'step': t, 'split': 'train', 'language/loss': fall(t) + 0.04 * rng.normal()}
    for t in range(1, steps + 1)
  ]
  valid = [
    {'step': t, 'split': 'valid', 'language/loss': fall(t) + 0.03, 'pretrain/loss': fall(t) + 0.1}
    for t in range(0, steps + 1, every)
  ]
  return train + valid


def ppo_metrics(rng, steps, tax):
  found = []
  for t in range(1, steps + 1):
    x = t / steps
    kl = 1.6 * x**1.3 if t > 1 else 0.0
    found.append(
      {
        'step': t,
        'split': 'train',
        'rollout/score': 1.4 * x + 0.12 * rng.normal(),
        'rollout/score_std': 1.1,
        'rollout/kl': kl + (0.05 * rng.normal() if t > 1 else 0),
        'rollout/kl_k3': kl * 0.9,
        'rollout/entropy': 0.62 - 0.15 * x + 0.01 * rng.normal(),
        'rollout/length': 8 + 0.6 * x + 0.1 * rng.normal(),
        'rollout/end_rate': 0.97 + 0.01 * x,
        'rollout/logprob_gap_mean': 2e-7,
        'rollout/logprob_gap_max': 3e-6 * (1 + rng.random()),
        'policy/clip_fraction': 0.06 + 0.02 * rng.random(),
        'policy/first_log_ratio_max': 4e-7,
        'value/clip_fraction': 0.02,
        'value/loss': 0.5 * np.exp(-3 * x) + 0.1,
        'value/explained_variance': 0.6 * (1 - np.exp(-5 * x)) - 0.05,
        'ptx/loss': 1.21 - 0.01 * x + 0.01 * rng.normal(),
        'grad_cosine/ppo_ptx': -0.02,
      }
    )
    if t == 1 or t % 10 == 0:
      s = 0 if t == 1 else t
      y = s / steps
      found.append(
        {
          'step': s,
          'split': 'valid',
          'kl': 1.6 * y**1.3,
          'score': 1.3 * y,
          'gold': 5.3 + 0.6 * y,
          'pretrain/loss': 1.2 + tax * y,
        }
      )
  return found


RESPONSES = {
  'base': 'The bell rang . The bell rang . Where is the bell ?',
  'sft': 'The baker is in the garden .',
  'ppo_ptx': 'Today the baker is in the garden .',
  'sft_best_of_16': 'Today the baker walks in the garden .',
}


def write_run(workdir, seed=11, tax=-0.01):
  """A healthy run with every stage."""
  rng = np.random.default_rng(seed)
  leave(workdir, 'pretrain', metrics=language(rng, 5.0, 1.2, 200, 50), unigram_loss=4.4)
  leave(workdir, 'sft', metrics=language(rng, 1.4, 0.5, 120, 30))
  leave(workdir, 'rl_init', metrics=language(rng, 1.3, 0.6, 60, 20))
  leave(workdir, 'collect', rows=[row('collect', 'labeler_agreement', 0.731, 0.72, 0.742)])
  bins = [
    {'confidence': c, 'accuracy': c + 0.02 * (-1) ** i, 'n': 400 - 30 * i}
    for i, c in enumerate(np.arange(0.525, 1.0, 0.05))
  ]
  ranking = [
    {
      'step': t,
      'split': 'train',
      'ranking/loss': 0.7 - 0.1 * t / 100 + 0.02 * rng.normal(),
      'ranking/accuracy': 0.5 + 0.16 * t / 100 + 0.02 * rng.normal(),
    }
    for t in range(1, 101)
  ]
  ranking += [
    {
      'step': t,
      'split': 'valid',
      'ranking/log_loss': 0.69 - 0.08 * t / 100,
      'ranking/accuracy': 0.5 + 0.15 * t / 100,
      'ranking/ece': 0.021,
      'ranking/length_correlation': 0.12,
    }
    for t in (25, 50, 75, 100)
  ]
  leave(
    workdir,
    'reward_model',
    metrics=ranking,
    calibration=bins,
    rows=[
      row('reward_model', 'valid_longer_accuracy', 0.53, 0.52, 0.54),
      row('reward_model', 'accuracy_gain_over_longer', 0.121, 0.11, 0.132),
      row('reward_model', 'valid_first_position_accuracy', 0.502, 0.49, 0.51),
      row('reward_model', 'accuracy_gain_over_first_position', 0.149, 0.14, 0.158),
      row('reward_model', 'noisy_accuracy', 0.651, 0.64, 0.662),
      row('reward_model', 'noisy_accuracy_gold', 0.752, 0.742, 0.762),
      row('reward_model', 'normalised_accuracy', 0.6, 0.56, 0.64),
      row('reward_model', 'gold_agreement', 0.781, 0.768, 0.794),
    ],
  )
  leave(workdir, 'select', selected='sft/3')
  facts = {'max_kl': 2.0, 'ptx_coef': 27.8, 'compute_dtype': 'float32', 'warnings': []}
  leave(workdir, 'ppo', metrics=ppo_metrics(rng, 60, tax), **facts)
  (workdir / 'ppo' / 'config.json').write_text(json.dumps({'seed': seed, 'ppo': {'kl_coef': 0.1}}))
  (workdir / 'ppo' / 'rejected.jsonl').write_text('{"why": "empty response"}\n')
  write_evaluation(workdir, seed)


def write_evaluation(workdir, seed):
  rng = np.random.default_rng(seed)
  e, rows = 'evaluate', []
  for model, gold, proxy in (
    ('base', 0.12, 0.1),
    ('rl_init', 0.47, 0.46),
    ('sft_best_of_4', 0.58, 0.7),
    ('sft_best_of_16', 0.63, 0.82),
    ('ppo_ptx', 0.634, 0.74),
    ('ppo_ptx_ema', 0.628, 0.73),
    ('demonstrations', 0.66, 0.6),
  ):
    for judge, value in (('gold', gold), ('reward_model', proxy)):
      value = value + 0.005 * rng.normal()
      where = {'model': model, 'baseline': 'sft', 'judge': judge}
      rows.append(row(e, 'win_rate', value, value - 0.022, value + 0.021, **where))
      strict = 0.5 + 1.2 * (value - 0.5)
      rows.append(row(e, 'win_rate_no_ties', strict, strict - 0.03, strict + 0.03, **where))
  for model, likert, kl, length, loss in (
    ('base', 2.1, None, 15.2, 1.2),
    ('sft', 5.3, None, 8.1, 1.4),
    ('rl_init', 5.25, 0.0, 8.2, 1.218),
    ('ppo_ptx', 5.9, 1.02, 8.6, 1.21),
    ('ppo_ptx_ema', 5.88, 0.98, 8.6, 1.211),
  ):
    rows += [
      row(e, 'likert', likert, likert - 0.05, likert + 0.05, model=model, judge='gold'),
      row(e, 'kl', kl, model=model),
      row(e, 'response_length', length, length - 0.1, length + 0.1, model=model),
      row(e, 'distinct_2', 0.31, model=model),
      row(e, 'end_rate', 0.98, model=model),
      row(e, 'pretrain_loss', loss, model=model),
      row(e, 'tax', loss - 1.218, model=model),
    ]
  samples = [
    {
      'step': 0,
      'model': m,
      'prompt': f'{i}: Write one sentence about the baker. Start with Today. <b>&| `x`',
      'response': text + (' please' if m == 'ppo_ptx' and i % 3 else ''),
      'score': float(rng.normal()),
      'gold': 1 + 6 * float(rng.random()),
    }
    for i in range(60)
    for m, text in (*RESPONSES.items(), ('rl_init', RESPONSES['sft']))
  ]
  leave(workdir, e, rows=rows, samples=samples)


class Parser(html.parser.HTMLParser):
  """Fails on tags closed out of order; keeps attributes and text."""

  VOID = {'meta', 'br', 'link', 'img', 'input', 'hr'}

  def __init__(self):
    super().__init__()
    self.open, self.attributes, self.text, self.tags = [], [], [], set()

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  write_run(workdir)
  return workdir, report.write_report(workdir, STAGES, title='A run', seed=11)


def parsed(path):
  parser = Parser()
  parser.feed(path.read_text(encoding='utf-8'))
  assert parser.open == []
  return parser


def test_html_is_one_selfcontained_page(run):
  parser = parsed(run[1].html)
  assert not {'script', 'link', 'img', 'iframe'} & parser.tags
  references = [v for k, v in parser.attributes if k in ('src', 'href', 'xlink:href', 'data')]
  assert references and all(v.startswith('#') for v in references)
  source = run[1].html.read_text()
  assert not re.findall(r'https?://|@import|url\((?!#)', source)
  ids = [v for k, v in parser.attributes if k == 'id']
  assert len(ids) == len(set(ids))
  assert {v[1:] for v in references} <= set(ids)
  text = ' '.join(parser.text)
  for word in ('63.', 'PPO-ptx', 'best of 16', 'pass', 'environment of', '1: Write one sentence'):
    assert word in text
  assert '<b>&| `x`' in text  # shown as text, not as a tag


def test_json_has_long_form_rows_with_the_seed_and_checks(run):
  data = json.loads(run[1].json.read_text())
  assert set(data) == {'title', 'seed', 'rows', 'checks'}
  assert all(set(r) == set(ROW_FIELDS) and r['seed'] == 11 for r in data['rows'])
  won = [r for r in data['rows'] if r['metric'] == 'win_rate' and r['model'] == 'ppo_ptx']
  assert {r['judge'] for r in won} == {'gold', 'reward_model'}
  assert {r['baseline'] for r in won} == {'sft'}
  seconds = [r for r in data['rows'] if r['metric'] == 'seconds']
  assert {r['stage'] for r in seconds} == set(STAGES)
  assert {c['status'] for c in data['checks']} == {'pass'}, [
    c for c in data['checks'] if c['status'] != 'pass'
  ]


def test_markdown_links_its_plots_and_they_are_svg(run):
  workdir, written = run
  text = written.markdown.read_text()
  links = re.findall(r'!\[[^\]]*\]\(([^)]+)\)', text)
  assert len(links) > 15
  for link in links:
    assert not link.startswith(('/', 'http'))
    assert ElementTree.parse(workdir / link).getroot().tag.endswith('svg')
  assert len(set(links)) == len(links) == len(list((workdir / 'report').glob('*.svg')))
  table = [line for line in text.splitlines() if line.startswith('| **PPO-ptx**')]
  assert table and '**SFT**' in table[0]
  widths = [len(re.findall(r'(?<!\\)\|', line)) for line in text.splitlines() if line[:2] == '| ']
  assert min(widths) >= 3


def test_equal_runs_write_equal_bytes_and_remove_old_plots(run):
  workdir, written = run
  before = {p: p.read_bytes() for p in (workdir / 'report').glob('*.svg')}
  page_before = written.html.read_bytes()
  (workdir / 'report' / 'stale.svg').write_text('<svg/>')
  report.write_report(workdir, STAGES, title='A run', seed=11)
  assert {p: p.read_bytes() for p in (workdir / 'report').glob('*.svg')} == before
  assert written.html.read_bytes() == page_before


def test_planted_habit_is_found(run):
  data = json.loads(run[1].json.read_text())
  rates = {r['metric']: r['value'] for r in data['rows'] if r['model'] == 'ppo_ptx'}
  assert any('please <end>' in name for name in rates)


def test_missing_stages_and_metrics_are_named(tmp_path):
  nothing = {'step': 1, 'split': 'train', 'language/loss': float('nan')}
  leave(tmp_path, 'pretrain', metrics=[nothing])
  written = report.write_report(tmp_path, STAGES, title='Half a run', seed=None)
  text = ' '.join(parsed(written.html).text)
  assert 'did not run in this workdir' in text
  assert 'No win rates were recorded' in text
  assert 'Not recorded, so not drawn: loss' in text
  status = {c.name: c.status for c in written.checks['pretrain']}
  assert status['all metrics finite'] == 'fail'
  assert status['held-out loss below unigram'] == 'absent'
  assert json.loads(written.json.read_text())['seed'] is None


def test_empty_workdir_still_gives_a_report(tmp_path):
  written = report.write_report(tmp_path / 'none', STAGES, title='Nothing', seed=0)
  assert '0 of 8 stages' in written.html.read_text()


def test_killed_run_leaves_half_a_line_and_repeated_steps(tmp_path):
  folder = tmp_path / 'sft'
  folder.mkdir()
  logged = ((1, 3.0), (2, 2.0), (1, 9.0))
  lines = [{'step': s, 'split': 'train', 'language/loss': v} for s, v in logged]
  text = '\n'.join(json.dumps(x) for x in lines) + '\n{"step": 3, "spl'
  (folder / 'metrics.jsonl').write_text(text)
  found = read_stage(tmp_path, 'sft').metrics
  assert [(m['step'], m['language/loss']) for m in found] == [(1, 9.0), (2, 2.0)]
  (folder / 'metrics.jsonl').write_text('{broken\n' + text)
  with pytest.raises(ValueError, match=r'metrics\.jsonl:1 is not JSON'):
    read_stage(tmp_path, 'sft')


def test_rows_of_another_form_are_refused(tmp_path):
  leave(tmp_path, 'evaluate', rows=[{'metric': 'win_rate', 'value': 1.0}])
  with pytest.raises(ValueError, match=r'rows\.json'):
    report.write_report(tmp_path, ['evaluate'], title='x', seed=0)


def test_stages_are_found_in_the_order_of_the_recipe(tmp_path):
  for name in ('evaluate', 'ppo_plain', 'sft', 'ppo', 'zebra'):
    leave(tmp_path, name)
  (tmp_path / 'report').mkdir()
  kinds = ('sft', 'ppo', 'evaluate')
  assert find_stages(tmp_path, kinds) == ['sft', 'ppo', 'ppo_plain', 'evaluate', 'zebra']
  assert find_setting({'a': {'b': 0.0}, 'c': [{'d': 3}]}, 'b') == 0.0
  assert find_setting({'a': {'b': 0.0}, 'c': [{'d': 3}]}, 'd') == 3
  assert find_setting({'a': 1}, 'b') is None


def test_several_seeds_and_the_tax_verdict(tmp_path):
  for seed, size in ((1, 0.06), (2, 0.07), (3, 0.065)):
    workdir = tmp_path / f's{seed}'
    write_run(workdir, seed=seed, tax=0.1 * size)
    rng = np.random.default_rng(seed)
    leave(workdir, 'ppo_plain', metrics=ppo_metrics(rng, 60, size), ptx_coef=0.0)
  out = tmp_path / 'all'
  report.combine_reports([tmp_path / f's{s}' for s in (1, 2, 3)], out, title='Three seeds')
  data = json.loads((out / 'report.json').read_text())
  assert data['seeds'] == [1, 2, 3] and data['tax']['status'] == 'met'
  # tax is 0.065 (KL / 1.6)^(1 / 1.3) in the mean; 0.25 lies below 0.02, 2 outside the range.
  assert [p['counts'] for p in data['tax']['points']] == [False, True, True, False]
  at = data['tax']['points'][2]
  assert at['ppo'] == pytest.approx(0.065 * (1 / 1.6) ** (1 / 1.3), abs=5e-4)
  mean = next(
    m
    for m in data['means']
    if (m['metric'], m['model'], m['judge']) == ('win_rate', 'ppo_ptx', 'gold')
  )
  rows = [
    r['value']
    for r in data['rows']
    if (r['metric'], r['model'], r['judge']) == ('win_rate', 'ppo_ptx', 'gold')
  ]
  assert len(rows) == 3 and mean['mean'] == pytest.approx(sum(rows) / 3)
  text = ' '.join(parsed(out / 'report.html').text)
  assert 'seed 2' in text and 'PPO-ptx at most half of PPO' in text
  assert (out / 'report' / 'tax-frontier.svg').is_file()


def test_command_writes_one_run_and_combines(tmp_path, capsys):
  leave(tmp_path / 'a', 'select', seed=4)
  assert report.main([str(tmp_path / 'a'), '--out', str(tmp_path / 'b')]) == 0
  assert len(capsys.readouterr().out.split()) == 2
  assert json.loads((tmp_path / 'a' / 'report.json').read_text())['seed'] == 4
  tax = json.loads((tmp_path / 'b' / 'report.json').read_text())['tax']
  assert tax['status'] == 'not measurable' and 'no trace of PPO and PPO-ptx' in tax['reason']


def test_command_refuses_with_one_line(tmp_path, capsys):
  assert report.main([str(tmp_path / 'nowhere')]) == 2
  assert 'nowhere is not a directory' in capsys.readouterr().err
  with pytest.raises(SystemExit):
    report.main([str(tmp_path), str(tmp_path)])
  assert '--out' in capsys.readouterr().err


def test_markdown_cells_and_fences_cannot_break_out():
  table = page.Table(('a', 'b'), [('x|y', 'two\nlines')])
  text = page.to_markdown([table, page.Samples('```\nhi', [('m', 'r|', '')])], 'report')
  assert r'x\|y' in text and 'two<br>lines' in text and '````' in text


def test_plot_names_belong_to_one_plot():
  figure = page.Figures([('same', 'caption', '<svg></svg>')])
  with pytest.raises(ValueError, match='same'):
    page.plots_of([figure, page.Folded('more', [figure])])
