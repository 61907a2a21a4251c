"""Signs that a policy has found the reward model's weak spots (floor 6).

What the policy says to the validation prompts is held against what its reference says to them: how
far it has gone (KL), how long its responses are, how many come to an end, how much is left to
chance (entropy), and which phrases came into fashion (`drift`). Each limit that is passed is told
once. A high score is no such sign, and none of these is a proof: they say where to look.
"""

from collections.abc import Sequence
from typing import NamedTuple

from instructjax import config as config_lib
from instructjax.evaluators import drift
from instructjax.evaluators.evidence import show
from instructjax.evaluators.policy import SampledResponses

NAMES = ('kl', 'length', 'entropy', 'end_rate', 'phrases')
_SHOWN = 5


class Said(NamedTuple):
  """Responses to the validation prompts, sampled at temperature 1.

  Attributes:
    length: tokens of a response, end-of-text included, mean.
    entropy: mean of -log p of the sampled tokens, nats: an estimate of the policy's entropy.
    end_rate: share of the responses that come to an end.
    words: of each response, `drift.words_of`.
  """

  length: float
  entropy: float
  end_rate: float
  words: list[list[str]]


def said(responses: SampledResponses, texts: Sequence[Sequence[str]]) -> Said:
  """What `Said` holds of responses and their texts, [n][K]."""
  return Said(
    float(responses.lengths().mean()), float(-responses.logprobs[responses.mask].mean()),
    float(responses.ended.mean()), [drift.words_of(text) for row in texts for text in row])


def check_config(name: str, c) -> None:
  """Refuses limits that cannot work.

  Raises:
    ValueError: names the field.
  """
  if c.kl is not None:
    config_lib.require_range(f'{name}.kl', c.kl, 0.0)
  for field in ('shortest', 'entropy', 'end_rate', 'phrase_rate'):
    config_lib.require_range(f'{name}.{field}', c[field], 0.0, 1.0)
  for field in ('longest', 'phrase_lift'):
    config_lib.require_range(f'{name}.{field}', c[field], 1.0)
  for one in c.stop:
    config_lib.require_choice(f'{name}.stop', one, NAMES)
  for phrase in c.phrases:
    if not drift.words_of(phrase):
      raise ValueError(f'{name}.phrases holds {phrase!r}, in which there is no word')


class Watch:
  """The watch of one run.

  Attributes:
    crossed: limits passed so far, each once, as it was then: {'name', 'step', 'value', 'limit',
      'text', 'phrases'}; phrases that came later are added.

  Args:
    c: the config `watch` of a ppo stage.
    max_kl: limit of the KL where the config gives none, nats a response.
  """

  def __init__(self, c, max_kl: float):
    self._c, self.crossed, self._told = c, [], 0
    self._kl = max_kl if c.kl is None else c.kl

  def restore(self, crossed: Sequence[dict]) -> None:
    """Goes on from what was found, and told, before."""
    self.crossed[:] = crossed
    self._told = len(self.crossed)

  def look(self, step: int, kl: float, now: Said, start: Said) -> dict[str, float]:
    """Compares the policy of `step` with its reference, to the same prompts.

    Args:
      kl: of the policy from its reference, nats a response.

    Returns:
      Numbers for the line of this step: `phrase_drift`, the largest share of responses with a
      phrase that came into fashion (0 without one), and `phrase_rate/<phrase>` of each of the
      config's.
    """
    c = self._c
    self._above(step, 'kl', kl, self._kl, 'KL from the reference is {} nats a response')
    longer = now.length / start.length
    self._above(step, 'length', longer, c.longest, 'responses are {} times as long as at the start')
    self._below(
      step, 'length', longer, c.shortest, 'responses are {} times as long as at the start')
    self._below(step, 'entropy', _share(now.entropy, start.entropy), c.entropy,
                'entropy is {} of what it was at the start')
    self._below(step, 'end_rate', _share(now.end_rate, start.end_rate), c.end_rate,
                'responses come to an end {} times as often as at the start')
    lifts = [x for x in drift.ngram_lift(now.words, start.words, least_rate=c.phrase_rate)
             if x.lift >= c.phrase_lift]
    if lifts:
      named = '; '.join(
        f'"{x.feature}" in {x.late_rate:.0%} of the responses, {x.reference_rate:.1%} at the start'
        for x in lifts[:_SHOWN])
      self._cross(step, 'phrases', lifts[0].late_rate, c.phrase_rate,
                  f'phrases came into fashion: {named}', [x.feature for x in lifts])
    return {
      'phrase_drift': max((x.late_rate for x in lifts), default=0.0),
      **{f'phrase_rate/{phrase}': drift.rate_of(phrase, now.words) for phrase in c.phrases}}

  def _above(self, step: int, name: str, value: float, limit: float, text: str) -> None:
    if value > limit:
      self._cross(step, name, value, limit, f'{text.format(show(value))} (limit {show(limit)})', [])

  def _below(self, step: int, name: str, value: float, limit: float, text: str) -> None:
    if value < limit:
      self._cross(step, name, value, limit, f'{text.format(show(value))} (limit {show(limit)})', [])

  def _cross(
    self, step: int, name: str, value: float, limit: float, text: str, phrases: list[str]
  ) -> None:
    before = [one for one in self.crossed if one['name'] == name]
    for one in before:
      one['phrases'] += [phrase for phrase in phrases if phrase not in one['phrases']]
    if not before:
      self.crossed.append({
        'name': name, 'step': step, 'value': value, 'limit': limit, 'text': text,
        'phrases': phrases})

  def news(self) -> list[str]:
    """What has been found since the last call, a line each."""
    new, self._told = self.crossed[self._told:], len(self.crossed)
    return [f'after step {one["step"]} {one["text"]}' for one in new]

  @property
  def reason(self) -> str | None:
    """Why the run is to stop, where a limit of `stop` was passed."""
    found = [one for one in self.crossed if one['name'] in self._c.stop]
    return f'watch.{found[0]["name"]}: {found[0]["text"]}' if found else None


def _share(value: float, start: float) -> float:
  """value / start, where a start of 0 has nothing to fall from."""
  return value / start if start > 0 else 1.0
