"""Items that sample: responses of one length, and of lengths that differ."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from instructjax import generation, sharding
from instructjax.benchmarks import lengths, work
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
