"""What a recipe trains and judges on, behind one interface (floor 3).

A corpus gives text by purpose; stages tokenise it. Three kinds: the embedded miniature world, files
of the forms that the README describes, and a directory that was prepared of any files.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from instructjax.data import few_shot, sources
from instructjax.data.miniature import panel
from instructjax.data.miniature.judge import best_response, judge
from instructjax.data.miniature.world import World, WorldSizes
from instructjax.data.prepared import Prepared
from instructjax.data.records import Demonstration, Document, Prompt, Ranking
from instructjax.data.sources import Rejected
from instructjax.data.tokenizer import Tokenizer, make_tokenizer

SPLITS = sources.SPLITS


class Corpus(Protocol):
  """Text by purpose and split ('train', 'valid', 'test'); splits share no prompt and no user."""

  has_gold: bool

  def documents(self, split: str) -> list[Document]:
    """Pretraining text."""

  def demonstrations(self, split: str) -> list[Demonstration]:
    """Prompts with the responses to imitate."""

  def prompts(self, purpose: str) -> list[Prompt]:
    """'ppo' for rollouts, 'rank' and 'rank_valid' for responses to be ranked, 'valid', 'test'."""

  def rankings(self, split: str) -> list[Ranking]:
    """Ranked responses that come with the data."""

  def gold(self, prompt: Prompt, response: str, ended: bool) -> float:
    """The gold judge's Likert score, 1..7, where `has_gold`."""


class MiniatureCorpus:
  """The embedded world: everything generated from a seed, and judged exactly."""

  has_gold = True

  def __init__(self, config, seed: int):
    """Builds the world of `seed`.

    Args:
      config: `users`, `labelers`, `labeler_agreement`, `calibration_prompts` of the world and the
        sizes `documents`, `valid_documents`, `demonstrations`, `valid_demonstrations`,
        `ppo_prompts`, `rank_prompts`, `rank_valid_prompts`, `valid_prompts`, `test_prompts`.
      seed: of the world.
    """
    self._config = config
    self.world = World(seed, WorldSizes(
      config.users, config.labelers, config.labeler_agreement, config.calibration_prompts))
    self._records = {}

  def documents(self, split: str) -> list[Document]:
    n = self._config.documents if split == 'train' else self._config.valid_documents
    texts = self.world.pretrain_documents(n, split)
    return [Document(id=f'miniature-{split}-{i}', text=t, title=None, source='miniature')
            for i, t in enumerate(texts)]

  def demonstrations(self, split: str) -> list[Demonstration]:
    if split == 'train':
      rows = self.world.demonstrations(self._config.demonstrations, 'train_sft')
    else:
      rows = self.world.demonstrations(self._config.valid_demonstrations, split)
    return [Demonstration(
      id=r['id'], prompt=r['prompt'], response=r['response'], user=r['user'],
      category=r['category'], source=r['source']) for r in rows]

  def prompts(self, purpose: str) -> list[Prompt]:
    c = self._config
    if purpose in ('rank', 'rank_valid'):
      records = self.world.prompts('train_rm', c.rank_prompts + c.rank_valid_prompts)
      records = (records[:c.rank_prompts] if purpose == 'rank' else records[c.rank_prompts:])
    else:
      split, n = {'ppo': ('train_ppo', c.ppo_prompts), 'valid': ('valid', c.valid_prompts),
                  'test': ('test', c.test_prompts)}[purpose]
      records = self.world.prompts(split, n)
    self._records.update((r.id, r) for r in records)
    return [Prompt(id=r.id, prompt=r.prompt, user=r.user, category=r.category, source='miniature')
            for r in records]

  def rankings(self, split: str) -> list[Ranking]:
    raise ValueError('the miniature world has no rankings of its own: name a collect stage')

  def gold(self, prompt: Prompt, response: str, ended: bool) -> float:
    return float(judge(self._records[prompt.id], response, ended).likert)

  def judgement(self, prompt: Prompt, response: str, ended: bool):
    """The whole judgement, with Table 3's metadata."""
    return judge(self._records[prompt.id], response, ended)

  def best(self, prompt: Prompt) -> str:
    """A response that the gold judge rates 7."""
    return best_response(self._records[prompt.id])

  def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
    """What a labeler would write."""
    labelers = self.world.labelers
    labeler = labelers[int(rng.integers(len(labelers)))]
    return self.world.write(self._records[prompt.id], rng, labeler.carelessness)

  def rank(
    self, prompt: Prompt, responses: list[str], rng: np.random.Generator, labeler=None
  ) -> tuple[list[list[int]], str]:
    """A labeler's ranking of distinct responses, best group first, and the labeler's id."""
    return self.world.label(self._records[prompt.id], responses, rng, labeler)

  def make_tokenizer(self, config, directory) -> Tokenizer:
    """One id a word of the world, where the kind is 'world'."""
    return make_tokenizer(config, directory, texts=self._texts, words=self.world.words)

  def _texts(self) -> Iterator[str]:
    return (d.text for d in self.documents('train'))


class PanelCorpus(MiniatureCorpus):
  """The miniature world with rankings of people's responses, several labelers on each."""

  def __init__(self, config, seed: int):
    """Builds the world of `seed` and asks its labelers.

    Args:
      config: as for `MiniatureCorpus`, and `panel`: `prompts`, `min_responses`, `max_responses`,
        `labels_each`, `style_spread`, `valid_fraction`.
      seed: of the world.
    """
    super().__init__(config, seed)
    c = config.panel
    self.sheets = panel.sheets(self.world, c.prompts, c.min_responses, c.max_responses)
    self.people = panel.styled(self.world.labelers, c.style_spread)
    rows = panel.rankings(self.sheets, self.people, c.labels_each, self.world.noise, seed)
    self._rankings = sources.split_by_hash(
      rows, sources.prompt_key, {'train': 1 - c.valid_fraction, 'valid': c.valid_fraction},
      salt='panel')

  def rankings(self, split: str) -> list[Ranking]:
    """'train' and 'valid'; there is no 'test'."""
    return self._rankings.get(split, [])


class _SplitCorpus:
  """Rows that were split when they were read or prepared: {kind: {split: records}}."""

  has_gold = False

  def __init__(self, splits: Mapping[str, Mapping[str, list]]):
    self._splits = splits

  def documents(self, split: str) -> list[Document]:
    return self._splits['pretrain'][split]

  def demonstrations(self, split: str) -> list[Demonstration]:
    return self._splits['demonstrations'][split]

  def prompts(self, purpose: str) -> list[Prompt]:
    """'ppo', 'valid', 'test'; rankings come with the data, so there is nothing to rank."""
    split = {'ppo': 'train', 'valid': 'valid', 'test': 'test'}[purpose]
    return self._splits['prompts'][split]

  def rankings(self, split: str) -> list[Ranking]:
    return self._splits['rankings'][split]

  def gold(self, prompt: Prompt, response: str, ended: bool) -> float:
    raise ValueError('files have no gold judge')

  def make_tokenizer(self, config, directory) -> Tokenizer:
    """As `make_tokenizer`; sentencepiece is trained on this corpus' own training text."""
    return make_tokenizer(config, directory, texts=self._texts, words=None)

  def _texts(self) -> Iterator[str]:
    for d in self.demonstrations('train'):
      yield d.prompt
      yield d.response
    for d in self.documents('train'):
      yield d.text


# What a recipe trains on -> the kinds of data that it is read from.
_NAMES = {
  'demonstrations': ('demonstrations',), 'rankings': ('rankings', 'comparisons'),
  'prompts': ('prompts',), 'pretrain': ('pretrain',)}


class FileCorpus(_SplitCorpus):
  """Files in a directory: demonstrations, rankings and comparisons, prompts, pretraining text.

  `<name>.jsonl` or `<name>.jsonl.gz` for each of `_NAMES`; rows that cannot be used are set aside
  in `rejected`. Rows are split by a hash of their prompt (text by a hash of itself), so one prompt
  is never in two splits, whatever file it stands in.
  """

  _READERS = {
    'demonstrations': sources.read_demonstrations, 'rankings': sources.read_rankings,
    'prompts': sources.read_prompts, 'pretrain': sources.read_documents}

  def __init__(self, config, seed: int, rejected: Rejected):
    """Finds and reads the files.

    Args:
      config: `dir`; `valid_fraction`, `test_fraction` of the prompts.
      seed: of the run; the splits do not depend on it.
      rejected: where rows are set aside.

    Raises:
      ValueError: no directory given, or a kind of file is missing; names what was looked for.
    """
    if not config.dir:
      raise ValueError('data.dir is empty: name the directory of the JSONL files, as in '
                       '--config=configs/real_text.py:data_dir=PATH')
    valid, test = config.valid_fraction, config.test_fraction
    fractions = {'train': 1 - valid - test, 'valid': valid, 'test': test}
    splits = {}
    for kind, names in _NAMES.items():
      paths = _find(config.dir, names)
      rows = list(self._READERS[kind](paths, rejected))
      key = sources.document_key if kind == 'pretrain' else sources.prompt_key
      splits[kind] = sources.split_by_hash(rows, key, fractions, salt='splits')
    tasks = sources.read_few_shot(_files(config.dir, ('few_shot',)), rejected)
    found = sources.split_by_hash(tasks, sources.prompt_key, fractions, salt='splits')
    super().__init__(_with_few_shot(splits, found, config))


class PreparedCorpus(_SplitCorpus):
  """What `python -m instructjax.data prepare` wrote, in the splits that it wrote.

  What was set aside is listed in the prepared directory.
  """

  def __init__(self, config):
    """Reads the directory `config.dir`.

    Raises:
      ValueError: it was not prepared to the end, or lacks a kind of data; says what to do.
    """
    found = Prepared(config.dir)
    for names in _NAMES.values():
      if not set(names) & set(found.kinds):
        raise ValueError(f'{config.dir} holds {", ".join(found.kinds)}, but no '
                         f'{" or ".join(names)}: prepare them with the others')
    splits = {
      kind: {split: [record for name in names for record in found.records(name, split)]
             for split in SPLITS}
      for kind, names in _NAMES.items()}
    tasks = {split: list(found.records('few_shot', split)) for split in SPLITS}
    super().__init__(_with_few_shot(splits, tasks, config))


def _with_few_shot(splits, tasks: Mapping[str, list[few_shot.FewShot]], config):
  """The splits with the demonstrations that few-shot tasks become.

  Tasks are split, not their examples, which show each other's responses.
  """
  if not any(tasks.values()):
    return splits
  return {**splits, 'demonstrations': {
    split: [*rows, *few_shot.expand_all(tasks[split], config.few_shot)]
    for split, rows in splits['demonstrations'].items()}}


def _files(directory, names: tuple[str, ...]) -> list[pathlib.Path]:
  paths = [pathlib.Path(directory) / f'{name}{suffix}'
           for name in names for suffix in ('.jsonl', '.jsonl.gz')]
  return [p for p in paths if p.is_file()]


def _find(directory, names: tuple[str, ...]) -> list[pathlib.Path]:
  found = _files(directory, names)
  if not found:
    wanted = ', '.join(f'{name}.jsonl, {name}.jsonl.gz' for name in names)
    raise ValueError(f'none of {wanted} is in {directory}')
  return found


def make_corpus(config, seed: int, rejected: Rejected) -> Corpus:
  """The corpus of a recipe's `data` config, by its `kind`.

  Kinds are 'miniature', 'panel', 'files' and 'prepared'.
  """
  if config.kind == 'miniature':
    return MiniatureCorpus(config, seed)
  if config.kind == 'panel':
    return PanelCorpus(config, seed)
  if config.kind == 'files':
    return FileCorpus(config, seed, rejected)
  if config.kind == 'prepared':
    return PreparedCorpus(config)
  raise ValueError(f"data.kind {config.kind!r}: use 'miniature', 'panel', 'files' or 'prepared'")
