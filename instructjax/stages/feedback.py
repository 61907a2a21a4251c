"""How good the reward model and the labelers are, where a gold judge can tell (floor 8)."""

import numpy as np

from instructjax.evaluators import statistics
from instructjax.evaluators.policy import from_texts
from instructjax.stages import sampling
from instructjax.stages.rows import row


def _padded(texts: list[list[str]], ctx):
  """([n, K, R] responses, [n, K] mask) of lists of different lengths."""
  k = max(len(t) for t in texts)
  encode = ctx.tokenizer.encode
  ids = [[np.array([*encode(t), ctx.tokenizer.end_id], np.int32) for t in row] for row in texts]
  mask = np.array([[i < len(row) for i in range(k)] for row in ids])
  filled = [row + [row[0]] * (k - len(row)) for row in ids]
  return from_texts(
    filled, ctx.config.limits.response_tokens, ctx.tokenizer.end_id), mask


def _grades(ranking, k: int) -> np.ndarray:
  out = np.zeros(k)
  for place, group in enumerate(ranking):
    out[list(group)] = -place
  return out


def judge_reward_model(ctx, ev, c) -> list[dict]:
  """Agreement with gold on samples of the reference, on mixed sources, and on fresh noisy labels.

  Args:
    ctx: of the run.
    ev: the `Evaluation`, for its prompts, evaluator, reward and reference.
    c: the stage's config.
  """
  rng = np.random.default_rng(ev.seed)
  prompts = ev.prompts
  responses = ev.evaluator.sample(
    ev.ref, prompts.tokens, ctx.key('evaluate agreement'), samples=c.samples)
  own = ev.judge(prompts, responses)
  scores, gold = own.judged['reward_model'], own.judged['gold']
  rows = [row('gold_agreement', 'reward_model', statistics.gold_agreement(
    scores, gold, seed=ev.seed), judge='gold')]
  mixed, kept = [], []
  for prompt, texts, ended in zip(
      prompts.prompts, sampling.texts(ctx, responses), responses.ended):
    whole = [t for t, e in zip(texts, ended) if e and t]
    found = list(dict.fromkeys([*whole, ctx.corpus.demonstrate(prompt, rng)]))
    if len(found) > 1:
      mixed.append(found)
      kept.append(prompt)
  index = {p.id: t for p, t in zip(prompts.prompts, prompts.tokens)}
  subset = sampling.PromptSet(kept, [index[p.id] for p in kept])
  padded, mask = _padded(mixed, ctx)
  judged = ev.judge(subset, padded).judged
  labels = [np.zeros(mask.shape), np.zeros(mask.shape)]
  for i, (prompt, texts) in enumerate(zip(kept, mixed)):
    people = rng.choice(len(ctx.corpus.world.labelers), 2, replace=False)
    for out, person in zip(labels, people):
      labeler = ctx.corpus.world.labelers[int(person)]
      ranking, _ = ctx.corpus.rank(prompt, texts, rng, labeler)
      out[i, :len(texts)] = _grades(ranking, len(texts))
  score, truth = judged['reward_model'], judged['gold']
  more = {'seed': ev.seed, 'mask': mask}
  rows += [
    row('gold_agreement_mixed', 'reward_model', statistics.gold_agreement(
      score, truth, **more), judge='gold'),
    row('noisy_accuracy', 'reward_model', statistics.noisy_accuracy(score, labels[0], **more)),
    row('noisy_accuracy', 'gold', statistics.noisy_accuracy(truth, labels[0], **more)),
    row('normalised_accuracy', 'reward_model', statistics.normalised_accuracy(
      score, truth, labels[0], **more)),
    row('labeler_agreement', None, statistics.labeler_agreement(labels[0], labels[1], **more))]
  return rows
