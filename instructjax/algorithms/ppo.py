"""PPO on a bandit: one prompt, one response, one score (floor 5).

Ouyang et al. 2022, section 3.5 and appendix C.4; Schulman et al. 2017; the code lineage of Ziegler
et al. 2019 and Stiennon et al. 2020. Four networks: policy and value are trained, ref and reward
are frozen. Dropout is off in all of them.

Order of an iteration: sample at temperature 1 -> score all tokens with the training forward ->
(for each minibatch) token rewards with k1 inside -> GAE -> returns -> whitened advantages -> one
update of policy and value.

Letters: U = minibatches x microbatches, m microbatches of a minibatch, n episodes of a microbatch,
P prompt, R response.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instructjax import arrays, scoring
from instructjax.algorithm import Algorithm, Pass, no_adapt
from instructjax.losses import policy as policy_losses
from instructjax.metrics import Last, Max, Mean, Min, NonFinite
from instructjax.models.transformer import ModelConfig
from instructjax.rl import advantages as rl_advantages
from instructjax.rl import kl, rewards
from instructjax.sampling import Sampling
from instructjax.types import Experience, Gather, Prompts, Rows, Samples, record

UNITS = ('token', 'sequence')
KL_LOSSES = ('none', 'k2', 'k3', 'exact')
SCOPES = ('none', 'minibatch', 'batch')


@dataclasses.dataclass(frozen=True)
class PPOSettings:
  """The numbers of PPO; every one is a field of the stage's config.

  Attributes:
    epochs, minibatches, microbatches: inner epochs; updates of an epoch; splits of a minibatch.
    gamma, gae_lambda: discount and GAE's lambda; 1 and 0.95 (the paper does not print lambda).
    clip_range, value_clip_range: of the surrogate and of the value loss (None: not clipped).
    value_coef: weight of the value loss.
    entropy_coef: weight of an entropy bonus; 0 in the paper.
    kl_coef: coefficient of the per-token KL inside the reward, in score units a nat.
    kl_target, kl_horizon: adaptive coefficient (Ziegler et al. 2019); a target of None keeps it
      constant.
    kl_loss, kl_loss_coef: an extra differentiable KL term. 'k2' and 'exact' have the gradient of
      KL(policy, ref) on the policy's own samples, 'k3' that of KL(ref, policy) there.
    score_bias, score_scale, score_clip: score <- clip((score - bias) * scale, +-clip).
    missing_end_penalty: subtracted from the score of a response without end-of-text.
    missing_end_score: if not None, replaces that score instead.
    whiten_rewards: divide token rewards by their standard deviation (never centred).
    whiten_advantages: 'none', 'minibatch' or 'batch': the scope of mean and deviation.
    unit: 'token' averages the losses over response tokens, 'sequence' sums them over each response
      and averages over responses.
  """

  epochs: int
  minibatches: int
  microbatches: int
  gamma: float
  gae_lambda: float
  clip_range: float
  value_clip_range: float | None
  value_coef: float
  entropy_coef: float
  kl_coef: float
  kl_target: float | None
  kl_horizon: float
  kl_loss: str
  kl_loss_coef: float
  score_bias: float
  score_scale: float
  score_clip: float | None
  missing_end_penalty: float
  missing_end_score: float | None
  whiten_rewards: bool
  whiten_advantages: str
  unit: str

  def __post_init__(self):
    for name, value, options in (
        ('unit', self.unit, UNITS), ('kl_loss', self.kl_loss, KL_LOSSES),
        ('whiten_advantages', self.whiten_advantages, SCOPES)):
      if value not in options:
        raise ValueError(f'ppo: {name} {value!r} is none of {options}')
    for name in ('epochs', 'minibatches', 'microbatches'):
      if getattr(self, name) < 1:
        raise ValueError(f'ppo: {name} {getattr(self, name)} is below 1')

  @property
  def splits(self) -> int:
    return self.minibatches * self.microbatches


@record
class Shaped:
  """An experience with its advantages and returns ([..., n, R] float32)."""

  experience: Experience
  advantages: Array
  returns: Array


def make_settings(config) -> PPOSettings:
  """PPOSettings from a stage config that holds its fields by the same names."""
  return PPOSettings(**{f.name: config[f.name] for f in dataclasses.fields(PPOSettings)})


def check_rollout_sampling(sampling: Sampling) -> None:
  """Refuses rollouts that are not the policy's own samples: the ratio would lack a denominator."""
  if not sampling.is_plain:
    raise ValueError(
      f'ppo rollouts need temperature 1, top_k 0 and top_p 1, not {sampling.temperature}, '
      f'{sampling.top_k}, {sampling.top_p}, and no stop_ids, not {sampling.stop_ids}: filtered '
      'samples are off the policy, so neither the ratio nor the KL would be right. Filter at '
      'evaluation instead.')


def shape_episodes(settings: PPOSettings, kl_coef, experience: Experience) -> Shaped:
  """Token rewards, GAE, returns, whitened advantages, over all leading axes at once.

  Returns are unwhitened advantages + old values; whitening comes last, over every response token
  given (DESIGN: the scope is the caller's slice).
  """
  e = experience
  lead = e.gather.mask.shape[:-1]
  flat = lambda x: x.reshape(-1, *x.shape[len(lead):])  # noqa: E731
  mask = flat(e.gather.mask)
  token_rewards = rewards.token_rewards(
    flat(e.scores), flat(e.old_logprobs), flat(e.ref_logprobs), mask, kl_coef)
  if settings.whiten_rewards:
    token_rewards = rewards.whiten_rewards(token_rewards, mask)
  advantages, returns = rl_advantages.gae(
    token_rewards, flat(e.old_values), mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
  if settings.whiten_advantages != 'none':
    advantages = arrays.whiten(advantages, mask)
  return Shaped(e, advantages.reshape(*lead, -1), returns.reshape(*lead, -1))


def _ppo_pass(
  settings: PPOSettings, policy: ModelConfig, value: ModelConfig, ref: ModelConfig
) -> Pass:
  def kl_total(params, frozen, e: Experience, logprobs, mask):
    if settings.kl_loss != 'exact':
      return kl.kl_loss_total(logprobs, e.ref_logprobs, mask, estimator=settings.kl_loss)
    slots = scoring.exact_kl(
      policy, params['policy'], ref, frozen['ref'], e.rows, e.gather.select)
    return arrays.masked_sum(scoring.to_responses(slots, e.gather), mask)

  def totals(params, frozen, extras, batch: Shaped, key):
    del extras, key
    e, mask = batch.experience, batch.experience.gather.mask
    slots = scoring.token_scores(policy, params['policy'], e.rows, e.gather.select)
    logprobs = scoring.to_responses(slots.logprobs, e.gather)
    entropy = scoring.to_responses(slots.entropy, e.gather)
    raw_values = scoring.values(value, params['value'], e.rows, e.gather.select)
    estimates = scoring.to_responses(scaled_values(settings, raw_values), e.gather)
    terms = {
      'policy': policy_losses.clipped_surrogate_total(
        logprobs, e.old_logprobs, batch.advantages, mask, clip_range=settings.clip_range),
      'value': policy_losses.clipped_value_total(
        estimates, e.old_values, batch.returns, mask,
        value_clip_range=settings.value_clip_range)}
    if settings.entropy_coef:
      terms['entropy'] = -policy_losses.entropy_total(entropy, mask)
    if settings.kl_loss != 'none':
      terms['kl'] = kl_total(params, frozen, e, logprobs, mask)
    log_ratio = jnp.where(mask, jnp.abs(logprobs - e.old_logprobs), 0)
    metrics = {
      **policy_losses.surrogate_metrics(
        logprobs, e.old_logprobs, batch.advantages, mask, clip_range=settings.clip_range),
      **policy_losses.value_metrics(
        estimates, e.old_values, batch.returns, mask,
        value_clip_range=settings.value_clip_range),
      'policy/log_ratio_max': Max(log_ratio.max()),
      'policy/entropy': Mean.of(entropy, mask),
      'policy/advantage_mean': Mean.of(batch.advantages, mask),
      'policy/advantage_square': Mean.of(batch.advantages**2, mask)}
    return terms, metrics

  def weights(batch: Shaped):
    mask = batch.experience.gather.mask
    tokens = mask.sum().astype(jnp.float32)
    episodes = mask.any(-1).sum().astype(jnp.float32)
    weight = tokens if settings.unit == 'token' else episodes
    names = ['policy', 'value']
    names += ['entropy'] if settings.entropy_coef else []
    names += ['kl'] if settings.kl_loss != 'none' else []
    return dict.fromkeys(names, weight)

  return Pass(name='ppo', stream='episodes', totals=totals, weights=weights)


def make_ppo(
  settings: PPOSettings, policy: ModelConfig, value: ModelConfig, ref: ModelConfig,
  collect: Callable,
) -> Algorithm:
  """PPO as an Algorithm; `with_ptx` of `algorithms.language_model` makes it PPO-ptx.

  Args:
    settings: numbers.
    policy, value, ref: sizes of the networks; policy and value may differ.
    collect: usually `make_collect(...)`: (params, frozen, extras, batch, key) -> (batch, metrics),
      the batch then holding 'episodes', an `Experience` or (whitening scope 'batch') `Shaped`.
  """
  coefs = {'policy': 1.0, 'value': settings.value_coef}
  if settings.entropy_coef:
    coefs['entropy'] = settings.entropy_coef
  if settings.kl_loss != 'none':
    coefs['kl'] = settings.kl_loss_coef

  def prepare(extras, minibatch):
    episodes = minibatch['episodes']
    if isinstance(episodes, Shaped):
      return minibatch
    return {**minibatch, 'episodes': shape_episodes(settings, extras['kl_coef'], episodes)}

  def adapt(extras, metrics):
    observed = metrics['rollout/kl']
    return {**extras, 'kl_coef': kl.adaptive_kl_coef(
      extras['kl_coef'], observed.compute(), target=settings.kl_target,
      horizon=settings.kl_horizon, episodes=observed.weight)}

  return Algorithm(
    collect=collect, prepare=prepare, passes=(_ppo_pass(settings, policy, value, ref),),
    coefs=lambda extras: dict(coefs), adapt=no_adapt if settings.kl_target is None else adapt,
    epochs=settings.epochs, minibatches=settings.minibatches,
    first=('policy/log_ratio_max', 'policy/loss'))


def split_episodes(x: Array, minibatches: int, microbatches: int) -> Array:
  """[n, ...] -> [u*m, n/(u*m), ...], every split taking episodes from all over the batch.

  Episode i belongs to minibatch i mod u, for any number of microbatches. The batch axis may be
  sharded; striding leaves each episode on its device.
  """
  splits = minibatches * microbatches
  size = arrays.exact_div(x.shape[0], splits, 'episodes a step / (minibatches x microbatches)')
  strided = x.reshape(size, microbatches, minibatches, *x.shape[1:])
  return strided.swapaxes(0, 2).reshape(splits, size, *x.shape[1:])


def join_episodes(x: Array, minibatches: int, microbatches: int) -> Array:
  """The inverse of `split_episodes`: [u*m, k, ...] -> [u*m*k, ...]."""
  strided = x.reshape(minibatches, microbatches, *x.shape[1:])
  return strided.swapaxes(0, 2).reshape(-1, *x.shape[2:])


def scaled_values(settings: PPOSettings, raw: Float[Array, '...']) -> Float[Array, '...']:
  """The value network's output in score units: the reward model it starts from is scored so too."""
  return (raw - settings.score_bias) * settings.score_scale


def lay_out_whole(settings: PPOSettings, prompts: Prompts, samples: Samples) -> tuple[Rows, Gather]:
  """The splits' episodes ([u*m, ...]), one a row, by maximum length."""
  splits = jax.tree.map(
    lambda x: split_episodes(x, settings.minibatches, settings.microbatches), (prompts, samples))
  return jax.lax.map(lambda x: scoring.episode_rows(
    x[0].tokens, x[0].length, x[0].item, x[1].tokens, x[1].mask), splits)


def fill_places(
  settings: PPOSettings, places: Rows, prompts: Prompts, samples: Samples
) -> Rows:
  """Rows of `data.episodes.episode_places` with their tokens."""
  tokens = split_episodes(
    jnp.concatenate([prompts.tokens, samples.tokens], axis=1), settings.minibatches,
    settings.microbatches)
  found = jax.vmap(lambda x, place: x.reshape(-1)[place])(tokens, places.tokens)
  return dataclasses.replace(places, tokens=jnp.where(places.group > 0, found, 0))


def score_samples(
  settings: PPOSettings, policy: ModelConfig, value: ModelConfig, ref: ModelConfig,
  params: dict, ref_params: dict, rows: Rows, gather: Gather, samples: Samples,
  raw_scores: Float[Array, 'n'],
) -> Experience:
  """One pass of policy, ref and value over each microbatch of episodes.

  Args:
    rows, gather: [u*m, ...] the splits' episodes in packed rows.
    samples, raw_scores: of all episodes, not split.
  """
  shaped = rewards.shape_scores(
    raw_scores, samples.ended, bias=settings.score_bias, scale=settings.score_scale,
    clip=settings.score_clip, missing_end_penalty=settings.missing_end_penalty,
    missing_end_score=settings.missing_end_score)

  def one(microbatch):
    rows, gather, scores, ended = microbatch
    read = lambda slots: scoring.to_responses(slots, gather)  # noqa: E731
    old = scoring.token_scores(policy, params['policy'], rows, gather.select, entropy=False)
    reference = scoring.token_scores(ref, ref_params, rows, gather.select, entropy=False)
    estimates = scoring.values(value, params['value'], rows, gather.select)
    return Experience(
      rows=rows, gather=gather, old_logprobs=read(old.logprobs),
      ref_logprobs=read(reference.logprobs),
      old_values=read(scaled_values(settings, estimates)), scores=scores, ended=ended)

  split = lambda x: split_episodes(x, settings.minibatches, settings.microbatches)  # noqa: E731
  return jax.lax.map(one, (rows, gather, split(shaped), split(samples.ended)))


def rollout_metrics(experience: Experience, samples: Samples, settings: PPOSettings) -> dict:
  """What an iteration shows of its episodes, before any update."""
  e, mask = experience, experience.gather.mask
  everywhere = jnp.ones_like(e.scores)
  sampled = split_episodes(samples.logprobs, settings.minibatches, settings.microbatches)
  gap = jnp.where(mask, jnp.abs(sampled - e.old_logprobs), 0)
  k1 = jnp.where(mask, kl.k1(e.old_logprobs, e.ref_logprobs), 0)
  k3 = jnp.where(mask, kl.k3(e.old_logprobs, e.ref_logprobs), 0)
  return {
    'rollout/score': Mean.of(e.scores, everywhere),
    'rollout/score_square': Mean.of(e.scores**2, everywhere),
    'rollout/score_min': Min(e.scores.min()),
    'rollout/score_max': Max(e.scores.max()),
    'rollout/kl': Mean.of(k1.sum(-1), everywhere),
    'rollout/kl_k3': Mean.of(k3.sum(-1), everywhere),
    'rollout/surprise_max': Max(jnp.where(mask, -e.old_logprobs, 0).max()),
    'rollout/log_ratio_ref_max': Max(jnp.where(mask, jnp.abs(k1), 0).max()),
    'rollout/length': Mean.of(mask.sum(-1), everywhere),
    'rollout/end_rate': Mean.of(e.ended, everywhere),
    'rollout/logprob_gap_mean': Mean.of(gap, mask),
    'rollout/logprob_gap_max': Max(gap.max()),
    'rollout/row_utilisation': Mean.of(e.rows.group > 0, jnp.ones_like(e.rows.group)),
    # Rows of all microbatches and selected slots of each: others are another compilation.
    'rollout/rows': Last(jnp.float32(e.rows.group.shape[0] * e.rows.group.shape[1])),
    'rollout/row_slots': Last(jnp.float32(e.gather.select.shape[2])),
  }


def rollout_faults(
  experience: Experience, samples: Samples, part_scores: dict[str, Float[Array, 'n']]
) -> dict[str, NonFinite]:
  """What of an iteration's episodes must be finite, in the order in which it is computed."""
  e, mask = experience, experience.gather.mask
  log_ratio = kl.k1(e.old_logprobs, e.ref_logprobs)
  return {
    'rollout/logprobs': NonFinite.of(samples.logprobs, samples.mask),
    **{f'reward/{name}': NonFinite.of(scores) for name, scores in part_scores.items()},
    'rollout/score': NonFinite.of(e.scores),
    'rollout/old_logprobs': NonFinite.of(e.old_logprobs, mask),
    'rollout/ref_logprobs': NonFinite.of(e.ref_logprobs, mask),
    'rollout/kl': NonFinite.of(log_ratio, mask),
    'rollout/old_values': NonFinite.of(e.old_values, mask)}
