"""Win rates, KL, tax, samples: every model on the same unseen prompts (floor 8)."""

import json
from typing import NamedTuple

import numpy as np

from instructjax import distributed
from instructjax.display import print_table, sample_table
from instructjax.evaluators import bootstrap, statistics
from instructjax.evaluators.likelihood import DocumentLosses
from instructjax.evaluators.policy import SampledResponses, from_texts
from instructjax.hooks import write_json_atomic
from instructjax.stages import feedback, language, sampling
from instructjax.stages.context import Context
from instructjax.stages.rows import row


class Measured(NamedTuple):
  """One model's answers to the test prompts with every judge's opinion ([n, K])."""

  responses: SampledResponses
  judged: dict[str, np.ndarray]  # by judge: 'gold', 'reward_model'


class Evaluation:
  """The evaluation of one run; `run` at the end of this module drives it."""

  def __init__(self, ctx: Context, name: str, c):
    self.ctx, self.name, self.c = ctx, name, c
    # Not of the stage's name: evaluations of a run share the samples of what they have in common.
    self.seed = ctx.seed('evaluate bootstrap')
    self.prompts = sampling.prompt_set(ctx, 'test', c.prompts)
    self.evaluator = sampling.make_evaluator(ctx, c.batch_size)
    self.reward = None if c.reward is None else ctx.load(c.reward, 'reward')
    self.ref = ctx.load(c.ref, 'policy')
    self.baseline = ctx.load(c.baseline_stage, 'policy')
    self.text = language.held_out(
      ctx, ctx.config[c.text_stage], 'pretrain', 'test', c.documents)
    self.ref_text = self.text.run(self.ref)

  def judge(self, prompts: sampling.PromptSet, responses: SampledResponses) -> Measured:
    """The responses with all judges' scores."""
    judged = {}
    if self.ctx.corpus.has_gold:
      judged['gold'] = sampling.gold_scores(self.ctx, prompts.prompts, responses)
    if self.reward is not None:
      judged['reward_model'] = self.evaluator.scores(
        self.ctx.model('reward'), self.reward, prompts.tokens, responses)
    return Measured(responses, judged)

  def sample(self, params, tag: str, *, temperature: float = 1.0, samples: int | None = None):
    """Answers of a model to the test prompts; `tag` names the stream of random numbers."""
    responses = self.evaluator.sample(
      params, self.prompts.tokens, self.ctx.key(f'evaluate {tag}'),
      samples=self.c.samples if samples is None else samples, temperature=temperature)
    return self.judge(self.prompts, responses)

  def wins(self, model: str, mine: Measured, baseline: str, other: Measured) -> list[dict]:
    """Win rates by every judge, ties half and without ties."""
    rows = []
    for judge in mine.judged:
      for metric, ties in (('win_rate', 'half'), ('win_rate_no_ties', 'without')):
        interval = statistics.win_rate(
          mine.judged[judge], other.judged[judge], ties=ties, seed=self.seed,
          resamples=self.c.resamples)
        rows.append(row(metric, model, interval, baseline=baseline, judge=judge))
    return rows

  def describe(self, model: str, mine: Measured) -> list[dict]:
    """Likert or score means, length, distinct n-grams, end-of-text rate."""
    rows = []
    if 'gold' in mine.judged:
      rows.append(row('likert', model, statistics.likert_mean(
        mine.judged['gold'], seed=self.seed), judge='gold'))
    if 'reward_model' in mine.judged:
      mean = bootstrap.mean_interval(
        mine.judged['reward_model'].mean(1), self.seed, self.c.resamples, 0.95)
      rows.append(row('score', model, mean, judge='reward_model'))
    tokens = [t[m].tolist() for t, m in zip(
      mine.responses.tokens.reshape(-1, mine.responses.tokens.shape[-1]),
      mine.responses.mask.reshape(-1, mine.responses.mask.shape[-1]))]
    rows.append(row('response_length', model, float(mine.responses.lengths().mean())))
    rows.append(row('end_rate', model, float(mine.responses.ended.mean())))
    rows += [row(f'distinct_{n}', model, statistics.distinct_n(tokens, n)) for n in (1, 2)]
    return rows

  def distance(self, model: str, params, mine: Measured) -> list[dict]:
    """KL to the reference and the tax on held-out text."""
    kl = self.evaluator.kl(params, self.ref, self.prompts.tokens, mine.responses)
    losses = self.text.run(params)
    tax, error = paired_tax(losses, self.ref_text)
    return [
      row('kl', model, bootstrap.mean_interval(
        kl.mean(1), self.seed, self.c.resamples, 0.95)),
      row('pretrain_loss', model, losses.mean(), n=len(losses.total)),
      row('tax', model, tax, low=tax - 1.96 * error, high=tax + 1.96 * error,
          n=len(losses.total))]

  def trace(self, stage: str) -> list[dict]:
    """(KL, tax) at every kept checkpoint of a ppo stage, on the test prompts and documents.

    Of the raw weights: an average starts at the reference and comes after them, so that its path
    says less about how far the training went.
    """
    # Every arm starts at the reference: no distance, no tax.
    found = [{'step': 0, 'kl': 0.0, 'tax': 0.0, 'tax_error': 0.0}]
    summary = self.ctx.summary(stage)
    for validation in summary['validations']:
      if not validation['step']:
        continue
      path = str(self.ctx.workdir / stage / 'checkpoints' / str(validation['step']))
      params = self.ctx.load(path, 'policy', weights='params')
      mine = self.sample(params, 'trace')
      kl = self.evaluator.kl(params, self.ref, self.prompts.tokens, mine.responses)
      tax, error = paired_tax(self.text.run(params), self.ref_text)
      entry = {'step': validation['step'], 'kl': float(kl.mean()), 'tax': tax, 'tax_error': error}
      entry.update({judge: float(s.mean()) for judge, s in mine.judged.items()})
      found.append(entry)
    return found

  def best_of(self, n_values: tuple[int, ...], baseline: Measured) -> list[dict]:
    """Best-of-n of the baseline by the reward model, against the baseline's plain samples."""
    if self.reward is None:
      return []
    few = self.prompts.first(self.c.best_of_prompts)
    pool = max(n_values)
    responses = self.evaluator.sample(
      self.baseline, few.tokens, self.ctx.key('evaluate best of'), samples=pool)
    mine = self.judge(few, responses)
    rows = []
    for n in n_values:
      groups = pool // n
      scores = mine.judged['reward_model'][:, :groups * n].reshape(len(few.tokens), groups, n)
      best = scores.argmax(-1)[..., None]
      pick = {j: np.take_along_axis(
        s[:, :groups * n].reshape(len(few.tokens), groups, n), best, -1)[..., 0]
        for j, s in mine.judged.items()}
      other = Measured(None, {j: s[:len(few.tokens)] for j, s in baseline.judged.items()})
      model = f'{self.c.baseline}_best_of_{n}'
      rows += self.wins(model, Measured(None, pick), self.c.baseline, other)
      if 'gold' in pick:
        rows.append(row('likert', model, statistics.likert_mean(
          pick['gold'], seed=self.seed), judge='gold'))
    return rows

  def best_temperature(self) -> float:
    """The baseline's own best temperature, on validation prompts by the reward model."""
    if self.reward is None:
      return 1.0
    valid = sampling.prompt_set(self.ctx, 'valid', self.c.best_of_prompts)
    scores = {}
    for temperature in self.c.temperatures:
      responses = self.evaluator.sample(
        self.baseline, valid.tokens, self.ctx.key('evaluate temperature'), samples=1,
        temperature=temperature)
      scores[temperature] = float(self.evaluator.scores(
        self.ctx.model('reward'), self.reward, valid.tokens, responses).mean())
    return max(scores, key=scores.get)


def paired_tax(losses: DocumentLosses, reference: DocumentLosses) -> tuple[float, float]:
  """(tax, standard error): difference of token-weighted mean losses over the same documents."""
  difference = losses.total - reference.total
  weight = reference.weight
  tax = difference.sum() / weight.sum()
  residual = difference - tax * weight
  n = len(weight)
  return float(tax), float(np.sqrt((residual**2).sum() * n / (n - 1)) / weight.sum())


def _samples(ev: Evaluation, measured: dict[str, Measured], count: int) -> list[dict]:
  out = []
  for model, mine in measured.items():
    texts = sampling.texts(ev.ctx, SampledResponses(*(x[:count, :1] for x in mine.responses)))
    for i, prompt in enumerate(ev.prompts.prompts[:count]):
      out.append({'step': 0, 'model': model, 'prompt': prompt.prompt, 'response': texts[i][0],
                  **{('gold' if j == 'gold' else 'score'): float(s[i, 0])
                     for j, s in mine.judged.items()}})
  return out


def _people(ev: Evaluation, baseline: Measured) -> list[dict]:
  """Where the demonstrations and the best possible response stand."""
  corpus, prompts = ev.ctx.corpus, ev.prompts.prompts
  rng = np.random.default_rng(ev.seed)
  rows = []
  for model, texts in (
      ('demonstrations', [corpus.demonstrate(p, rng) for p in prompts]),
      ('maximum', [corpus.best(p) for p in prompts])):
    ids = [[np.array([*ev.ctx.tokenizer.encode(t), ev.ctx.tokenizer.end_id], np.int32)]
           for t in texts]
    responses = from_texts(ids, ev.ctx.config.limits.response_tokens, ev.ctx.tokenizer.end_id)
    mine = ev.judge(ev.prompts, responses)
    rows += ev.wins(model, mine, ev.c.baseline, baseline) + ev.describe(model, mine)
  return rows


def _show(name: str, rows: list[dict], samples: list[dict]) -> None:
  """Win rates and a few answers, on the terminal."""
  percent = lambda x: f'{100 * x:.1f} %'  # noqa: E731
  print_table(
    f'{name}: win rates, ties half', ('model', 'against', 'judge', 'win rate', '95 % interval'),
    [(r['model'], r['baseline'], r['judge'], percent(r['value']),
      f'{percent(r["low"])} to {percent(r["high"])}')
     for r in rows if r['metric'] == 'win_rate'])
  answers = {}
  for sample in samples:
    answers.setdefault(sample['prompt'], {})[sample['model']] = sample['response']
  sample_table([{'prompt': p, **a} for p, a in list(answers.items())[:5]])


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Evaluates every model of the config against the baseline; see the report for the rows."""
  ev = Evaluation(ctx, name, c)
  baseline = ev.sample(ev.baseline, 'baseline')
  rows, measured = [], {c.baseline: baseline}
  temperature = ev.best_temperature()
  tuned = ev.sample(ev.baseline, 'best temperature', temperature=temperature)
  tuned_name = f'{c.baseline}_best_temperature'
  if not c.models_only:
    rows += ev.describe(c.baseline, baseline) + ev.distance(c.baseline, ev.baseline, baseline)
    rows += ev.wins(tuned_name, tuned, c.baseline, baseline) + ev.describe(tuned_name, tuned)
  for model, (stage, weights) in c.models.items():
    params = ctx.load(stage, 'policy', weights=weights)
    mine = ev.sample(params, model)
    measured[model] = mine
    rows += ev.wins(model, mine, c.baseline, baseline)
    rows += ev.wins(model, mine, tuned_name, tuned)
    rows += ev.describe(model, mine) + ev.distance(model, params, mine)
  if not c.models_only:
    rows += ev.best_of(tuple(c.best_of), baseline)
  if ctx.corpus.has_gold and not c.models_only:
    rows += _people(ev, baseline)
    if ev.reward is not None:
      rows += feedback.judge_reward_model(ctx, ev, c)
  for stage in c.traces:
    write_json_atomic(ctx.directory(stage) / 'trace.json', ev.trace(stage))
  samples = _samples(ev, measured, c.shown_samples)
  if distributed.is_first():
    with open(ctx.directory(name) / 'samples.jsonl', 'w', encoding='utf-8') as file:
      for sample in samples:
        file.write(json.dumps(sample, ensure_ascii=False) + '\n')
  _show(name, rows, samples)
  wins = {r['model']: r['value'] for r in rows if r['metric'] == 'win_rate'
          and r['baseline'] == c.baseline and r['judge'] == (
            'gold' if ctx.corpus.has_gold else 'reward_model')}
  return {'best_temperature': temperature, 'win_rates': wins, 'models_only': c.models_only}, rows
