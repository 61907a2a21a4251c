"""What the training stages of a recipe run, with shapes in place of arrays (floor 8).

The functions are the stages' own (`stages.*.job`, `loop.compile_step`, `algorithms.rollout`); the
batches are packed by their loaders from made-up data.
"""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import loop, sharding, train_state
from instructjax.algorithms import rollout
from instructjax.data.sources import Rejected
from instructjax.models.flops import Work
from instructjax.plan import made_up
from instructjax.profiling import PartTimer
from instructjax.sampling import Sampling
from instructjax.stages import dpo, feed, language, ppo, reward_model, training
from instructjax.stages.context import Context
from instructjax.stopping import Stopper
from instructjax.train_state import TrainState
from instructjax.types import Gather, Prompts, Rows

# Batches that are looked at: the work of a step is their mean, its shape that of the widest. The
# documents of PPO-ptx are many, so fewer are.
_BATCHES, _BATCHES_PPO = 8, 2
KINDS = ('language', 'reward_model', 'dpo', 'ppo')


class Program(NamedTuple):
  """One compiled function of a stage.

  Attributes:
    name: of it.
    function: from `jax.jit`.
    arguments: shapes with shardings.
    kept: those of the arguments that are on the devices whether it runs or not.
    rounds: times that a loop of unknown length goes round.
  """

  name: str
  function: Callable
  arguments: tuple
  kept: Any
  rounds: int = 1


class Filling(NamedTuple):
  """What a stream of the step holds, and how many places its rows have."""

  work: Work
  places: int


class Planned(NamedTuple):
  """A training stage without arrays.

  Attributes:
    name, job: of it.
    state, frozen, streams: shapes of what is on the devices.
    programs: in the order in which a step runs them.
    filling: by stream; of PPO's episodes under 'episodes'.
    sampled: response tokens of a step and of the longest response.
  """

  name: str
  job: training.Job
  state: TrainState
  frozen: dict
  streams: dict
  programs: tuple[Program, ...]
  filling: dict[str, Filling]
  sampled: tuple[int, int]

  def program(self, name: str) -> Program:
    """The program of that name."""
    return next(p for p in self.programs if p.name == name)

  @property
  def kept(self) -> tuple:
    """What stays on the devices throughout."""
    return self.state, self.frozen, self.streams


def make_context(config, mesh: Mesh) -> Context:
  """A run's context without files: made-up data on a mesh that need not be there.

  Raises:
    ValueError: a network's attention cannot run on these devices.
  """
  size = config.plan.vocab_size
  tokenizer = made_up.Tokenizer(config.tokenizer.vocab_size if size is None else size)
  ctx = Context(config, pathlib.Path(), mesh, made_up.Corpus(config), tokenizer, Rejected(),
                Stopper())
  for role, model in config.models.items():
    ctx.attention(role, model.context)
  return ctx


def make_job(ctx: Context, name: str) -> training.Job:
  """What a training stage computes; its rankings are made up wherever the recipe has them from."""
  c = ctx.config[name]
  if c.kind == 'language':
    return language.job(ctx, name, c)[0]
  if c.kind == 'ppo':
    return ppo.job(ctx, name, c, PartTimer(None))
  if isinstance(ctx.corpus, made_up.Corpus):
    c = c.copy_and_resolve_references()
    c.rankings = 'data'
    # All prompts of one length have the same made-up text, so that rows would be taken for one.
    if c.kind == 'reward_model':
      c.merge_labels = False
  if c.kind == 'dpo':
    found = dpo.make_items(ctx, c, 'train')
    most = max(len(item.group.branches) for item in found)
    sums = [np.zeros(len(item.group.branches), np.float32) for item in found]
    return dpo.job(ctx, name, c, found, most, None if c.ref_logprobs == 'online' else sums)[0]
  return reward_model.job(ctx, name, c)[0]


def shaped(tree: Any, where: jax.sharding.Sharding) -> Any:
  """Shapes of arrays, or of shapes, in one sharding."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def plan_stage(ctx: Context, name: str) -> Planned:
  """The stage's programs, ready to be lowered."""
  job, mesh = make_job(ctx, name), ctx.mesh
  batches = _BATCHES_PPO if 'value' in job.optimizers else _BATCHES
  built = [job.build(step)[0] for step in range(min(batches, job.steps))]
  widest, filling = {}, {}
  for stream in built[0]:
    records, works = zip(*(feed.with_work(batch[stream]) for batch in built))
    widest[stream] = max(records, key=_places)
    filling[stream] = Filling(
      _mean(works), round(sum(_places(record) for record in records) / len(built)))
  streams = {stream: shaped(batch, sharding.batch_sharding(mesh, _axis(stream)))
             for stream, batch in widest.items()}
  optimizers, schedules = training.make_optimizers(job)
  targets = {role: ctx.target(of) for role, of in job.network.items()}
  frozen = {role: t for role, t in targets.items() if role not in optimizers}
  state = train_state.abstract_state(
    {role: targets[role] for role in optimizers}, optimizers, ema_roles=job.ema_roles,
    extras=job.extras, mesh=mesh)
  step = loop.compile_step(
    job.algorithm, optimizers, schedules, job.averaging, state, frozen, mesh)
  programs, validation, batch, collected, sampled = (), (), streams, {}, (0, 0)
  if isinstance(job.algorithm.collect, rollout.Collect):
    lengths = made_up.sampled(ctx.config, widest['prompts'].length.size)
    sampled = int(lengths.sum()), int(lengths.max())
    programs, batch, collected = _rollout(
      ctx, job.algorithm.collect, state, frozen, streams, widest['prompts'], lengths)
    rows = batch['episodes'].rows if hasattr(batch['episodes'], 'rows') else (
      batch['episodes'].experience.rows)
    filling['episodes'] = Filling(Work(), math.prod(rows.tokens.shape))
    validation = _validation(ctx, name, state, frozen)
  update = Program(
    'update', step, (state, frozen, batch, collected, _key(mesh)),
    (state, frozen, {k: v for k, v in batch.items() if k in streams}))
  return Planned(
    name, job, state, frozen, streams, (*programs, update, *validation), filling, sampled)


def _axis(stream: str) -> int:
  return 0 if stream == 'prompts' else 1


def _places(stream: Any) -> int:
  rows = stream.rows if hasattr(stream, 'rows') else stream
  return math.prod(rows.tokens.shape)


def _mean(works: Sequence[Work]) -> Work:
  return sum(works, Work()).times(1 / len(works))


def _key(mesh: Mesh):
  return shaped(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))


def _rollout(
  ctx: Context, collect: rollout.Collect, state: TrainState, frozen: dict, streams: dict,
  prompts, lengths,
):
  """(programs before the update, its batch, the metrics that come with it)."""
  mesh, made = ctx.mesh, collect.programs
  whole, split = sharding.batch_sharding(mesh, 0), sharding.batch_sharding(mesh, 1)
  rep = sharding.replicated(mesh)
  policy, given = state.params['policy'], streams['prompts']
  sampler = policy if collect.generation_shardings is None else jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), policy,
    collect.generation_shardings)
  sample = (sampler, given, _key(mesh))
  samples = shaped(jax.eval_shape(made.sample, *sample)[0], whole)
  if collect.row_length is None:
    lay_out = (given, samples)
    rows, gather = shaped(jax.eval_shape(made.lay_out, *lay_out), split)
  else:
    places, gather = _places_of(collect, prompts, lengths, split)
    lay_out = (places, given, samples)
    rows = shaped(jax.eval_shape(made.lay_out, *lay_out), split)
  programs = [
    Program('sample', made.sample, sample, (policy, given) if sampler is policy else given,
            int(lengths.max())),
    Program('lay out', made.lay_out, lay_out, given)]
  scores = {part.name: jax.ShapeDtypeStruct(prompts.length.shape, np.float32, sharding=whole)
            for part in collect.parts}
  for part in collect.parts:
    if isinstance(part, rollout.ModelReward):
      reward = frozen[part.role]
      programs.append(Program(
        f'score by {part.name}', made.score[part.name], (reward, rows, gather), reward))
  finish = (state.params, frozen['ref'], state.extras['kl_coef'], rows, gather, samples, scores)
  experience, metrics = jax.eval_shape(made.finish, *finish)
  programs.append(Program('score by ref, value', made.finish, finish, finish[:3]))
  others = {name: stream for name, stream in streams.items() if name != 'prompts'}
  batch = {**others, 'episodes': shaped(experience, split)}
  return tuple(programs), batch, shaped(metrics, rep)


def _validation(ctx: Context, name: str, state: TrainState, frozen: dict) -> tuple[Program, ...]:
  """What validates the policy: samples of a call at once, their KL and scores."""
  evaluator = ppo.validation_evaluator(ctx, ctx.config[name])
  n, whole = evaluator.batch_size, sharding.batch_sharding(ctx.mesh, 0)
  prompts = shaped(Prompts(
    jax.ShapeDtypeStruct((n, evaluator.prompt_length), np.int32),
    jax.ShapeDtypeStruct((n,), np.int32), jax.ShapeDtypeStruct((n,), np.int32)), whole)
  sampling = Sampling(evaluator.max_tokens, evaluator.end_id)
  policy = state.params['policy']
  sample = evaluator.sampler(sampling, 1)
  samples = shaped(jax.eval_shape(sample, policy, prompts, _key(ctx.mesh)), whole)
  programs = [
    Program('validation: sample', sample, (policy, prompts, _key(ctx.mesh)), policy,
            evaluator.max_tokens),
    Program('validation: kl', evaluator.kl_program, (policy, frozen['ref'], prompts, samples),
            (policy, frozen['ref']))]
  if 'reward' in frozen:
    programs.append(Program(
      'validation: score', evaluator.scorer(ctx.model('reward')),
      (frozen['reward'], prompts, samples), frozen['reward']))
  return tuple(programs)


def _places_of(collect: rollout.Collect, prompts, lengths, split) -> tuple[Rows, Gather]:
  given = np.stack([prompts.length, lengths, prompts.item])
  return shaped(collect.places(given, prompts.tokens.shape[1]), split)
