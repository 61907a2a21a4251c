"""Few-shot and user-based tasks of labelers, and the examples that they expand into.

A task is an instruction with n pairs of query and response. It becomes n examples: each has one
query to answer, and the other pairs before it as context (Ouyang et al. 2022, section 3.2 and
appendix A.1). A user-based task is written for what a user has applied with, its `application`.

The examples of a task show each other's responses. So a task is split as one, and rules and splits
come before the expansion.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instructjax.data import records
from instructjax.data.records import Demonstration, Prompt


@dataclasses.dataclass(frozen=True)
class FewShot:
  """An instruction with pairs of query and response.

  Attributes:
    prompt: the instruction, under the name that rules and splits know.
    queries, responses: the pairs; a query may be empty where the instruction says all.
    application: what a user wants the model for, of a user-based task.
    provenance: 'labeler' where the row does not say: these are what labelers write.
  """

  id: str
  prompt: str
  queries: tuple[str, ...]
  responses: tuple[str, ...]
  source: str
  user: str | None = None
  category: str | None = None
  application: str | None = None
  organisation: str | None = None
  provenance: str | None = 'labeler'
  consent: bool | None = None

  @property
  def pairs(self) -> tuple[tuple[str, str], ...]:
    """(query, response) of each pair."""
    return tuple(zip(self.queries, self.responses))


@dataclasses.dataclass(frozen=True)
class Form:
  """How a task is written: instruction, pairs and query, each after a blank line.

  Attributes:
    query, response: what stands before them; an empty query has no line.
    between: what parts instruction and pairs.
  """

  query: str = 'Input:\n'
  response: str = 'Output:\n'
  between: str = '\n\n'

  def write(self, instruction: str, context: Sequence[tuple[str, str]], query: str) -> str:
    """The prompt, which ends where the response begins."""
    parts = [instruction, *(self._asked(q) + r for q, r in context), self._asked(query)]
    return self.between.join(part for part in parts if part)

  def _asked(self, query: str) -> str:
    return f'{self.query}{query}\n{self.response}' if query else self.response


def expand(
  task: FewShot, form: Form, *, shots: int | None = None, seed: int = 0
) -> list[Demonstration]:
  """One demonstration for each pair, the others before it in their order.

  Args:
    form: how it is written.
    shots: at most so many others, drawn anew for each pair; None takes all.
    seed: of the draw, which depends on it, the task's id and the pair alone.
  """
  if shots is not None and shots < 0:
    raise ValueError(f'shots is {shots}; it must be at least 0, or None for all other pairs')
  found = []
  for i, (query, response) in enumerate(task.pairs):
    prompt = form.write(task.prompt, [task.pairs[j] for j in _others(task, i, shots, seed)], query)
    found.append(Demonstration(id=f'{task.id}/{i}', prompt=prompt, response=response,
                               **_origin(task)))
  return found


def expand_prompts(
  task: FewShot, form: Form, *, shots: int | None = None, seed: int = 0
) -> list[Prompt]:
  """The prompts of `expand`, for labelers to answer or rank."""
  return [Prompt(id=d.id, prompt=d.prompt, **_origin(task))
          for d in expand(task, form, shots=shots, seed=seed)]


def _others(task: FewShot, pair: int, shots: int | None, seed: int) -> list[int]:
  """Which pairs stand before pair `pair`."""
  others = [j for j in range(len(task.pairs)) if j != pair]
  if shots is None or shots >= len(others):
    return others

  def lot(j: int) -> bytes:
    return hashlib.sha256(f'{seed}\n{task.id}\n{pair}\n{j}'.encode()).digest()

  return sorted(sorted(others, key=lot)[:shots])


def _origin(task: FewShot) -> dict[str, Any]:
  category = task.application if task.category is None else task.category
  return {'source': task.source, 'user': task.user, 'category': category,
          'organisation': task.organisation, 'provenance': task.provenance,
          'consent': task.consent}


def expand_all(tasks: Iterable[FewShot], config) -> list[Demonstration]:
  """The demonstrations of all tasks, as `configs.common.few_shot` says."""
  form = Form(config.query, config.response, config.between)
  return [d for task in tasks for d in expand(task, form, shots=config.shots, seed=config.seed)]


def few_shot_from_row(row: Mapping[str, Any], default_id: str, default_source: str) -> FewShot:
  """Fields prompt and pairs, or queries and responses; optional application and those of a prompt.

  A pair is [query, response], or an object with `query` and `response`, or `input` and `output`.

  Raises:
    ValueError: with a short reason, as in `records`.
  """
  start = records.prompt_from_row(row, default_id, default_source)
  pairs = _zipped(row) if row.get('pairs') is None else row['pairs']
  if not isinstance(pairs, (list, tuple)) or not pairs:
    raise ValueError('field pairs is missing or not a list')
  queries, responses = zip(*map(_pair, pairs))
  # Checked as any optional name is.
  application = records.prompt_from_row(
    {'prompt': '', 'category': row.get('application')}, '', '').category
  origin = dataclasses.asdict(start)
  if start.provenance is None:
    origin['provenance'] = 'labeler'
  return FewShot(queries=queries, responses=responses, application=application, **origin)


def _zipped(row: Mapping[str, Any]) -> list[tuple[Any, Any]] | None:
  """The pairs of lists queries and responses, as records are stored; None without them."""
  queries, responses = row.get('queries'), row.get('responses')
  if not isinstance(queries, (list, tuple)) or not isinstance(responses, (list, tuple)):
    return None
  if len(queries) != len(responses):
    raise ValueError('queries and responses differ in number')
  return list(zip(queries, responses))


def _pair(pair: Any) -> tuple[str, str]:
  """Query and response of one pair, checked as those of a demonstration."""
  if isinstance(pair, Mapping):
    pair = [pair.get('query', pair.get('input')), pair.get('response', pair.get('output'))]
  if not isinstance(pair, (list, tuple)) or len(pair) != 2:
    raise ValueError('a pair is not a query and a response')
  made = records.demonstration_from_row({'prompt': pair[0], 'response': pair[1]}, '', '')
  return made.prompt, made.response
