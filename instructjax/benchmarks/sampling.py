"""Items that sample: responses of one length, and of lengths that differ."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from instructjax import generation, sharding
from instructjax.benchmarks import lengths, measure, work
from instructjax.benchmarks.case import Case, Setup, init, prompts
from instructjax.sampling import Sampling

# No response ends early: the longest case, and the same work for every program.
NEVER = -1
# Responses that grow at a time in `refill`, unless told otherwise.
REFILL_SLOTS = 64


def rollout(setup: Setup):
  """step() -> responses, all of the shape's length."""
  params, given = init(setup, 'policy', 0), prompts(setup)
  sample = jax.jit(sharding.on_mesh(setup.mesh, lambda params, given, key: generation.generate(
    setup.model, params, given, key, Sampling(setup.shape.response, NEVER), slots=setup.slots,
    mesh=setup.mesh)))
  return lambda: sample(params, given, jax.random.key(0))


def decode(setup: Setup) -> Iterator[Case]:
  """Responses of one length, and from their seconds those of a decode step.

  Its fields: `step_ms`, (seconds - seconds of reading the prompts and drawing one token) / (tokens
  - 1); `step_bytes`, the parameters once, in the dtype of the activations, and of the cache what
  holds a token, in the mean of all steps; `bytes_s`, and `of_copy`, its share of what a copy
  reaches on this device.
  """
  s, model = setup.shape, setup.model
  first = setup._replace(shape=dataclasses.replace(s, response=1), context=model.context)
  prefill = measure.middle(measure.timed(rollout(first), 3).seconds)
  itemsize = np.dtype(setup.dtype).itemsize
  parameters = setup.size.layers * 12 * setup.size.width**2 + setup.size.width * model.vocab_size
  token = 2 * setup.size.layers * setup.size.width
  moved = itemsize * (parameters + s.sequences * token * (s.prompt + s.response / 2))
  ceiling = measure.copy_ceiling()

  def derive(median: float) -> dict:
    step = (median - prefill) / (s.response - 1)
    return {'prefill_s': round(prefill, 4), 'step_ms': round(1e3 * step, 4),
            'step_bytes': round(moved), 'bytes_s': round(moved / step),
            'of_copy': round(moved / step / ceiling, 4)}

  yield Case('decode', rollout(setup), work.tokens('decode', s),
             work.FLOPS['rollout'](setup.size, s), derive=derive)


def refill(setup: Setup) -> Iterator[Case]:
  """Responses of different lengths: slots that take the next prompt, beside all at once.

  Its fields: `useful_decoding`, sampled tokens over decode steps times the slots that took them;
  `mean_tokens`, `longest`; `slots`; `prefills`, how often prompts are read, a slotful each time,
  which seconds and FLOPs include.
  """
  slots = REFILL_SLOTS if setup.slots is None else setup.slots
  for law in lengths.LAWS:
    shape = dataclasses.replace(setup.shape, response=len(law.ends))
    for variant, used in (('slots', min(slots, shape.sequences)), ('whole', shape.sequences)):
      yield _refill(setup._replace(shape=shape), law, variant, used)


def _refill(setup: Setup, law: lengths.Lengths, variant: str, slots: int) -> Case:
  s, model = setup.shape, setup.model
  params = lengths.ending_policy(model, init(setup, 'policy', 0), s.prompt, law.ends)
  given = prompts(setup)
  rule = Sampling(s.response, lengths.END)
  sample = jax.jit(sharding.on_mesh(
    setup.mesh, lambda params, given, key: generation.generate_counted(
      model, params, given, key, rule, slots=slots, mesh=setup.mesh)))
  step = lambda: sample(params, given, jax.random.key(0))  # noqa: E731
  samples, spent = step()
  found = np.asarray(samples.mask).sum(-1)
  return Case(
    f'refill:{law.name}:{variant}', step, int(found.sum()),
    work.sampling_flops(setup.size, s.prompt, found), fields={
      'useful_decoding': round(float(found.sum() / np.asarray(spent).sum()), 4),
      'mean_tokens': round(float(found.mean()), 2), 'longest': int(found.max()),
      'slots': slots, 'prefills': -(-s.sequences // slots)})
