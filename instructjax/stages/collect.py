"""Responses ranked by labelers: the data of the reward model (floor 8).

Distinct responses of the loss-best SFT candidate at temperature 1, some of another model and some
of people, ranked by the simulated labelers of the miniature world with ties.
"""

import gzip
import json
import os

import numpy as np

from instructjax import distributed
from instructjax.stages import sampling
from instructjax.stages.context import Context


def _draw(rng, pools: list[list[str]], want: int) -> list[tuple[str, int]]:
  """Up to `want` distinct (text, pool number), pools in order, in random order."""
  seen, out = set(), []
  for number, pool in enumerate(pools):
    for text in pool:
      if text and text not in seen and len(out) < want:
        seen.add(text)
        out.append((text, number))
  return [out[i] for i in rng.permutation(len(out))]


def _ended(ctx: Context, responses) -> list[list[str]]:
  """The texts that came to an end; people rank whole responses only."""
  return [[t for t, e in zip(row, ended) if e]
          for row, ended in zip(sampling.texts(ctx, responses), responses.ended)]


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Writes train.jsonl.gz and valid.jsonl.gz, rows of the rankings form.

  Raises:
    ValueError: the corpus has no labelers to ask.
  """
  if not ctx.corpus.has_gold:
    raise ValueError(f'stage {name!r} needs the labelers of the miniature world; with rankings as '
                     "data leave it out and set reward_model.rankings to 'data'")
  evaluator = sampling.make_evaluator(ctx, c.batch_size)
  best = ctx.workdir / ctx.summary(c.policy)['loss_best']
  main = ctx.load(str(best), 'policy', weights='params')
  other = ctx.load(c.other_policy, 'policy')
  counts = {}
  for split, purpose in (('train', 'rank'), ('valid', 'rank_valid')):
    prompts = sampling.prompt_set(ctx, purpose)
    rng = np.random.default_rng(ctx.seed(f'{name} {split}'))
    key = ctx.key(f'{name} {split}')
    sampled = _ended(ctx, evaluator.sample(
      main, prompts.tokens, key, samples=c.max_responses))
    extra = _ended(ctx, evaluator.sample(
      other, prompts.tokens, ctx.key(f'{name} {split} other'), samples=1))
    counts[split] = _write(ctx, c, split, name, prompts, rng, sampled, extra)
  summary = {
    f'{split}_{k}': v for split, found in counts.items() for k, v in found.items()}
  return summary, [{'metric': 'rankings', 'model': None, 'value': counts['train']['rankings']}]


def _write(ctx: Context, c, split, name, prompts, rng, sampled, extra) -> dict:
  found = {'rankings': 0, 'responses': 0, 'too_few_distinct': 0}
  # Every process draws and counts the same; the first one's lines are kept.
  path = ctx.directory(name) / f'{split}.jsonl.gz' if distributed.is_first() else os.devnull
  with gzip.open(path, 'wt', encoding='utf-8', compresslevel=1) as file:
    for number, (prompt, pool, others) in enumerate(zip(prompts.prompts, sampled, extra)):
      want = int(rng.integers(c.min_responses, c.max_responses + 1))
      written = [ctx.corpus.demonstrate(prompt, rng)] if (
        rng.random() < c.demonstration_share) else []
      second = others if rng.random() < c.other_share * want else []
      drawn = _draw(rng, [second, written, pool], want)
      # A peaked model repeats itself; what is left below the paper's K = 4 is still a ranking.
      if len(drawn) < 2:
        found['too_few_distinct'] += 1
        continue
      responses = [text for text, _ in drawn]
      ranking, labeler = ctx.corpus.rank(prompt, responses, rng)
      models = [(c.other_policy, 'labeler', c.policy)[source] for _, source in drawn]
      file.write(json.dumps({
        'id': f'{name}-{split}-{number:06d}', 'source': name, 'license': None,
        'category': prompt.category, 'prompt': prompt.prompt, 'responses': responses,
        'ranking': ranking, 'labeler': labeler, 'models': models, 'label_kind': 'simulated'}))
      file.write('\n')
      found['rankings'] += 1
      found['responses'] += len(responses)
  return found
