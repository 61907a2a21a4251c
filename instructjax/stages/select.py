"""Which SFT candidate is the baseline: the paper's rule, beside the loss and the judge (floor 8).

The paper keeps the checkpoint with the best reward-model score on validation prompts, not the best
loss (Ouyang et al. 2022, section 3.5). Where a gold judge exists, the better of the two by gold on
the same validation prompts is what win rates are measured against, so that no win is due to a
baseline that was chosen badly.
"""

import numpy as np

from instructjax.stages import sampling
from instructjax.stages.context import Context


def run(ctx: Context, name: str, c) -> tuple[dict, list[dict]]:
  """Scores every candidate of a language stage; its summary names the chosen checkpoint."""
  candidates = ctx.summary(c.candidates)['candidates']
  if not candidates:
    raise ValueError(f'stage {c.candidates!r} kept no candidates: set {c.candidates}.candidates')
  evaluator = sampling.make_evaluator(ctx, 512)
  prompts = sampling.prompt_set(ctx, 'valid', c.prompts)
  reward, model = ctx.load(c.reward, 'reward'), ctx.model('reward')
  found = []
  for candidate in candidates:
    params = ctx.load(str(ctx.workdir / candidate['checkpoint']), 'policy', weights='params')
    responses = evaluator.sample(params, prompts.tokens, ctx.key(name), samples=c.samples)
    scores = evaluator.scores(model, reward, prompts.tokens, responses)
    entry = {**candidate, 'score': float(scores.mean()),
             'score_std': float(scores.std()), 'end_rate': float(responses.ended.mean())}
    if ctx.corpus.has_gold:
      entry['gold'] = float(np.mean(sampling.gold_scores(ctx, prompts.prompts, responses)))
    found.append(entry)
  by_score = max(found, key=lambda r: r['score'])
  by_loss = min(found, key=lambda r: r['loss'])
  chosen, rule = by_score, 'reward model score'
  if ctx.corpus.has_gold and by_loss['gold'] > by_score['gold']:
    chosen, rule = by_loss, "loss (better by gold than the reward model's choice)"
  rows = [{'metric': f'{quantity}_validation', 'model': f'{c.candidates}@{r["step"]}',
           'value': r[quantity]} for r in found for quantity in ('loss', 'score', 'gold')
          if quantity in r]
  return {
    'checkpoint': chosen['checkpoint'], 'weights': 'params', 'rule': rule, 'candidates': found,
    'by_score': by_score['checkpoint'], 'by_loss': by_loss['checkpoint']}, rows
