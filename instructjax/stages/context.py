"""What every stage of a run shares: config, directories, mesh, tokenizer, corpus (floor 8)."""

import dataclasses
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from instructjax import distributed, sharding, train_state
from instructjax.data import border
from instructjax.data.corpus import make_corpus
from instructjax.data.items import Limits
from instructjax.data.sources import Rejected
from instructjax.data.tokenizer import Tokenizer, load_tokenizer
from instructjax.display import say
from instructjax.hooks import write_json_atomic
from instructjax.models import attention, heads, presets
from instructjax.models.transformer import ModelConfig
from instructjax.profiling import ProfiledSteps
from instructjax.stopping import Stopper
from instructjax.stored import load_item


@dataclasses.dataclass
class Context:
  """One run.

  Attributes:
    config: the locked recipe.
    workdir: where the stages' directories are.
    mesh: all devices.
    corpus, tokenizer: the data.
    rejected: rows set aside while reading; stages add to it and write it.
    stopper: set by SIGTERM and SIGINT.
    profile: the steps to trace, or None.
    instead: what is done with a training stage in place of training it, or None; does not return.
    borders: kinds of data whose border between prompt and response has been looked at.
  """

  config: Any
  workdir: pathlib.Path
  mesh: Mesh
  corpus: Any
  tokenizer: Tokenizer
  rejected: Rejected
  stopper: Stopper
  profile: ProfiledSteps | None = None
  instead: Callable[[Any], NoReturn] | None = None
  borders: set[str] = dataclasses.field(default_factory=set)

  def directory(self, stage: str) -> pathlib.Path:
    return self.workdir / stage

  def key(self, stage: str) -> jax.Array:
    """The stage's key: of the seed and the stage's name."""
    return jax.random.fold_in(
      jax.random.key(self.config.seed), zlib.crc32(stage.encode()) & 0x7FFFFFFF)

  def seed(self, stage: str) -> int:
    """A host seed of the seed and the stage's name, for data order."""
    return zlib.crc32(f'{self.config.seed} {stage}'.encode()) & 0x7FFFFFFF

  def model(self, role: str, **changes) -> ModelConfig:
    """Sizes of a role's network; the value network has the reward model's.

    'reward_base' is a policy of the reward model's sizes: what a reward model starts from that
    cannot start from the policy.
    """
    role = {'value': 'reward', 'ref': 'policy', 'reward_base': 'reward'}.get(role, role)
    model = presets.make_model_config(
      self.config.models[role], vocab_size=self.tokenizer.vocab_size)
    return dataclasses.replace(model, **changes)

  def attention(self, role: str, length: int) -> str:
    """The backend that a role's network attends with, over rows of `length` tokens.

    Raises:
      ValueError: the one that its config names cannot run on this mesh.
    """
    model = self.model(role)
    shape = (
      sharding.batch_shards(self.mesh), length, model.heads, model.width // model.heads)
    return sharding.on_mesh(self.mesh, lambda: attention.choose(
      model.attention, shape, model.compute_dtype, sharding.platform()))()

  def attention_step(self, role: str, rows: int) -> str:
    """How a network attends to its cache where `rows` responses grow by one token."""
    model = self.model(role)
    shape = rows, 1, model.heads, model.width // model.heads
    return sharding.on_mesh(self.mesh, lambda: attention.choose_step(
      model.attention, shape, sharding.platform()))()

  def rules(self, role: str) -> dict:
    role = {'ref': 'policy', 'reward_base': 'reward'}.get(role, role)
    return dict(self.config.rules[role])

  def splits_width(self, role: str) -> bool:
    """Whether a network's parameters are split over fsdp along the width."""
    return self.mesh.shape['fsdp'] > 1 and self.rules(role)['embed'] == 'fsdp'

  def limits(
    self, role: str, row_length: int, prompt: int | None = None, response: int | None = None
  ) -> Limits:
    """What an item for this role's network may measure; None takes the recipe's own limit."""
    c = self.config.limits
    return Limits(
      c.prompt_tokens if prompt is None else prompt,
      c.response_tokens if response is None else response,
      row_length, self.model(role).context, c.truncate_prompts)

  def check_borders(self, what: str, pairs: Iterable[border.Pair]) -> None:
    """Says, once for each kind of data, where the tokens of prompt + response are not those of the
    running text; stages tokenise the same rows again."""
    if what in self.borders:
      return
    self.borders.add(what)
    report = border.examine(
      self.tokenizer, list(pairs), self.config.tokenizer.checked_pairs)
    for line in border.in_words(what, report):
      say(line)

  def fresh(self, role: str, key: jax.Array, *, head_init: str = 'zero'):
    """New parameters of a role, in their shardings."""
    return train_state.init_sharded(
      self._init(role, head_init), self.mesh, self.rules(role), key)[0]

  def _init(self, role: str, head_init: str = 'zero'):
    model = self.model(role)
    if role in ('policy', 'ref', 'reward_base'):
      return lambda k: heads.init_policy_boxed(model, k)
    return lambda k: heads.init_scalar_boxed(model, k, head_init=head_init)

  def target(self, role: str):
    """Shapes and shardings of a role's parameters."""
    return train_state.abstract_params(self._init(role), self.mesh, self.rules(role))

  def summary(self, stage: str) -> dict:
    """What a completed stage left.

    Raises:
      ValueError: the stage is not complete.
    """
    path = self.directory(stage) / 'summary.json'
    if not path.exists():
      raise ValueError(
        f'stage {stage!r} has not been completed in {self.workdir}: put it before the stage that '
        'needs it in config.stages, or give the path of a checkpoint')
    return json.loads(path.read_text())

  def checkpoint(self, source: str) -> tuple[pathlib.Path, str]:
    """(checkpoint directory, 'params' or 'ema') of a stage's result, or of a path."""
    if source in self.config.stages or (self.directory(source) / 'summary.json').exists():
      summary = self.summary(source)
      return self.workdir / summary['checkpoint'], summary['weights']
    path = pathlib.Path(source)
    if not path.is_dir():
      raise ValueError(
        f'{source!r} is neither a stage ({", ".join(self.config.stages)}) nor a directory')
    return path, 'params'

  def load(self, source: str, role: str, *, as_role: str | None = None, weights: str | None = None):
    """Parameters that stage or path `source` stores for `role`, in the shardings of `as_role`."""
    path, item = self.checkpoint(source)
    item = item if weights is None else weights
    return load_item(path, item, {role: self.target(as_role or role)})[role]

  def load_as_scalar(self, source: str, key: jax.Array, *, head_init: str):
    """A policy's trunk under a fresh scalar head: the start of a reward model."""
    path, item = self.checkpoint(source)
    fresh = self.fresh('reward', key, head_init=head_init)
    target = {k: v for k, v in self.target('reward').items() if k != 'head'}
    trunk = load_item(path, item, {'policy': target})['policy']
    return {**trunk, 'head': fresh['head']}

  def finish(self, stage: str, summary: dict, rows: list[dict]) -> None:
    """Writes a stage's results; the summary last, since it marks the stage complete."""
    directory = self.directory(stage)
    write_json_atomic(directory / 'rows.json', [
      {'stage': stage, 'metric': r['metric'], 'model': r.get('model'),
       'baseline': r.get('baseline'), 'judge': r.get('judge'), 'value': r['value'],
       'low': r.get('low'), 'high': r.get('high'), 'n': r.get('n'), 'seed': self.config.seed}
      for r in rows])
    write_json_atomic(directory / 'summary.json', {**summary, 'complete': True})
    distributed.written_by_first(directory / 'summary.json')


def make_context(config, workdir: pathlib.Path) -> Context:
  """Builds what the stages share; the tokenizer is made once and stored with the run.

  Raises:
    ValueError: the mesh, the data or a network's attention does not fit what is there.
  """
  mesh = sharding.make_mesh(config.mesh)
  rejected = Rejected()
  corpus = make_corpus(config.data, config.data.seed if config.data.seed is not None
                       else config.seed, rejected)
  directory = workdir / 'tokenizer'
  if distributed.is_first() and not (directory / 'tokenizer.json').exists():
    # Under another name until it is whole.
    part = directory.with_name('tokenizer.part')
    shutil.rmtree(part, ignore_errors=True)
    corpus.make_tokenizer(config.tokenizer, part)
    part.rename(directory)
  distributed.written_by_first(directory / 'tokenizer.json')
  tokenizer = load_tokenizer(directory)
  ctx = Context(config, workdir, mesh, corpus, tokenizer, rejected, Stopper())
  for role, model in config.models.items():
    ctx.attention(role, model.context)
  return ctx
