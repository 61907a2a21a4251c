"""Next-token prediction: pretraining, supervised fine-tuning, and the ptx term (floor 5)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from instructjax import scoring
from instructjax.algorithm import Algorithm, Pass, offline, with_pass
from instructjax.losses import language
from instructjax.models.transformer import ModelConfig
from instructjax.types import LanguageBatch

UNITS = ('token', 'sequence')


def document_count(batch: LanguageBatch) -> Float[Array, '']:
  """Documents in a minibatch: the groups that start in its rows."""
  starts = (batch.rows.parent < 0) & (batch.rows.group > 0)
  return starts.sum().astype(jnp.float32)


def language_pass(
  model: ModelConfig, *, name: str, stream: str, unit: str, z_loss: float, dropout: bool
) -> Pass:
  """A cross-entropy pass of the policy over a stream of `LanguageBatch`.

  Args:
    model: the policy's sizes.
    name: of the pass and its term.
    stream: key of the batch.
    unit: 'token' divides by the summed token weights (so per-token weights of 1/length, as the
      loader may give, make it a mean over responses), 'sequence' divides the sum of token losses by
      the number of documents, as equation 2 of Ouyang et al. 2022 reads.
    z_loss: coefficient of log(normaliser)^2 inside the term; 0 leaves it out.
    dropout: residual dropout on (supervised fine-tuning) or off (ptx, pretraining).
  """
  if unit not in UNITS:
    raise ValueError(f'{name}: unit {unit!r} is none of {UNITS}')

  def totals(params, frozen, extras, batch: LanguageBatch, key):
    del frozen, extras
    scores = scoring.token_scores(
      model, params['policy'], batch.rows, batch.select, dropout_key=key if dropout else None,
      entropy=False)
    total = language.cross_entropy_total(scores.logprobs, batch.weight)
    if z_loss:
      total += z_loss * language.z_loss_total(scores.log_normalizer, batch.weight)
    return {name: total}, {}

  def weights(batch: LanguageBatch):
    return {name: batch.weight.sum() if unit == 'token' else document_count(batch)}

  return Pass(name=name, stream=stream, totals=totals, weights=weights)


def make_language_model(model: ModelConfig, *, unit: str, z_loss: float) -> Algorithm:
  """Pretraining and supervised fine-tuning; which tokens count is the loader's matter."""
  one = language_pass(
    model, name='language', stream='examples', unit=unit, z_loss=z_loss,
    dropout=model.dropout > 0)
  return offline((one,), {'language': 1.0})


def with_ptx(algorithm: Algorithm, model: ModelConfig, *, ptx_coef: float, unit: str) -> Algorithm:
  """Adds the pretraining term of PPO-ptx (Ouyang et al. 2022, equation 2) to any algorithm.

  objective += ptx_coef * mean over pretraining tokens (or documents) of -log policy(token)

  Both gradients enter one optimizer update. The paper's 27.8 has no unit of its own, since it does
  not say how either term is averaged. Here, with `unit='token'` on both sides, each term is a mean
  over its own tokens: against sums per sequence on both sides that multiplies ptx_coef by (mean
  response tokens / mean document tokens); and whitening the advantages, which divides the policy
  term by their standard deviation s, multiplies the effective ptx_coef by s in score units.

  Args:
    algorithm: whose batch gets one more stream, 'pretrain'.
    ptx_coef: gamma of equation 2, in the units above; 0 leaves the algorithm as it is.
    unit: 'token' or 'sequence'.
  """
  if ptx_coef < 0:
    raise ValueError(f'ptx_coef {ptx_coef} is negative')
  if ptx_coef == 0:
    return algorithm
  extra = language_pass(
    model, name='ptx', stream='pretrain', unit=unit, z_loss=0.0, dropout=False)
  return with_pass(algorithm, extra, {'ptx': ptx_coef})
