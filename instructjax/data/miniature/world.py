"""The miniature world: prompts, demonstrations, rankings, pretraining text, and their hash."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from instructjax.data.miniature import labelers as labelers_lib
from instructjax.data.miniature import tasks, text, vocabulary
from instructjax.data.miniature.facts import draw_facts
from instructjax.data.miniature.judge import best_response, judge, perfect_response
from instructjax.data.miniature.labelers import Labeler
from instructjax.data.miniature.tasks import PromptRecord

# Share of the prompt texts, and of the users, that belongs to each split (by hash).
SPLITS = {'train_sft': 0.30, 'train_rm': 0.25, 'train_ppo': 0.25, 'valid': 0.08, 'test': 0.12}
TRAIN_SPLITS = frozenset({'train_sft', 'train_rm', 'train_ppo'})


@dataclasses.dataclass(frozen=True)
class WorldSizes:
  """Sizes of a world.

  Attributes:
    users: number of users; how many prompts they send falls as 1 / rank.
    labelers: number of simulated labelers, at least 2.
    labeler_agreement: target agreement of two labelers on pairs both rank strictly.
    calibration_prompts: prompts on which the labelers' noise is calibrated.
  """

  users: int
  labelers: int
  labeler_agreement: float
  calibration_prompts: int


DEFAULT_SIZES = WorldSizes(
  users=400, labelers=12, labeler_agreement=0.73, calibration_prompts=1500
)


def _number(*parts: object) -> int:
  digest = hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).digest()
  return int.from_bytes(digest[:8], 'big')


def _split_of(name: str, key: str) -> str:
  """The split that a prompt text or user belongs to."""
  at = _number(name, key) / 2**64 * sum(SPLITS.values())
  for split, share in SPLITS.items():
    at -= share
    if at < 0:
      return split
  return split


class World:
  """One seeded world. Everything is a function of (seed, sizes) and of the arguments.

  Attributes:
    seed, sizes: as given.
    words: the whole vocabulary.
    facts: what is true here.
    users: user ids, the heaviest first.
    labelers: the simulated labelers.
    noise: standard deviation of the labelers' noise, Likert points.
  """

  def __init__(self, seed: int, sizes: WorldSizes | Mapping[str, float]):
    if not isinstance(sizes, WorldSizes):
      sizes = WorldSizes(**dict(sizes))
    if sizes.labelers < 2 or sizes.users < 2 * len(SPLITS):
      raise ValueError(
        f'a world needs at least 2 labelers and {2 * len(SPLITS)} users, got {sizes.labelers} '
        f'and {sizes.users}: raise world.labelers or world.users'
      )
    self.seed, self.sizes, self.words = seed, sizes, vocabulary.WORDS
    self.facts = draw_facts(self._rng('facts'))
    self.users = tuple(f'user-{i:04d}' for i in range(sizes.users))
    self.labelers = labelers_lib.draw_labelers(self._rng('labelers'), sizes.labelers)
    self._records: dict[str, list[PromptRecord]] = {}
    self._streams: dict[str, np.random.Generator] = {}
    self._seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    weights = 1.0 / np.arange(1, sizes.users + 1)
    self._split_users = {}
    for split in SPLITS:
      mine = [i for i, u in enumerate(self.users) if _split_of(f'user {seed}', u) == split]
      if not mine:
        raise ValueError(f'split {split} has no user of {sizes.users}: raise world.users')
      self._split_users[split] = (mine, weights[mine] / weights[mine].sum())
    self.noise = labelers_lib.calibrate_noise(
      self.labelers,
      [labelers_lib.rate(*item) for item in self._calibration_items()],
      sizes.labeler_agreement,
      (seed, _number('calibration noise')),
    )

  def _rng(self, *purpose: object) -> np.random.Generator:
    return np.random.default_rng((self.seed, _number(*purpose)))

  # Prompts.

  def prompts(self, split: str, n: int) -> list[PromptRecord]:
    """The first `n` prompts of a split; the splits share neither users nor prompt texts.

    Raises:
      ValueError: no such split.
    """
    if split not in SPLITS:
      raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    records = self._records.setdefault(split, [])
    rng = self._streams.setdefault(split, self._rng('prompts', split))
    while len(records) < n:
      records.append(self._draw_prompt(split, len(records), rng))
    return records[:n]

  def _draw_prompt(self, split: str, number: int, rng: np.random.Generator) -> PromptRecord:
    """A prompt of the split; repeats of a text only where new ones are hard to find."""
    shares = np.array(list(tasks.SHARES.values()))
    category = tuple(tasks.SHARES)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    style = tasks.STYLES[int(rng.choice(3, p=tasks.STYLE_SHARES))]
    users, weights = self._split_users[split]
    user = self.users[int(rng.choice(users, p=weights))]
    seen, name = self._seen[split], f'miniature-{split}-{number:06d}'
    for _ in range(30):
      record = self._compose(name, user, category, style, frozenset({split}), rng)
      if record.prompt not in seen:
        break
    seen.add(record.prompt)
    return record

  def _request(
    self, category: str, style: str, splits: frozenset[str], rng: np.random.Generator
  ) -> tasks.Request:
    """A request whose wording in `style`, constraint apart, belongs to one of `splits`."""
    while True:
      request = tasks.draw_request(rng, self.facts, category)
      wording = request.continued if style == 'continuation' else request.direct
      if _split_of('prompt', wording) in splits:
        return request

  def _compose(
    self,
    name: str,
    user: str,
    category: str,
    style: str,
    splits: frozenset[str],
    rng: np.random.Generator,
  ) -> PromptRecord:
    request = self._request(category, style, splits, rng)
    shot = self._shot(category, splits, rng) if style == 'few_shot' else ''
    if shot:
      constraint = tasks.Constraint('count', request.count) if request.count else None
      prompt = f'{shot} q : {request.direct} a :'
    if not shot or len(prompt.split()) > tasks.MAX_PROMPT_WORDS:
      style = 'direct' if style == 'few_shot' else style
      constraint = tasks.draw_constraint(rng, request)
      prompt = request.continued if style == 'continuation' else request.direct
      if constraint is not None and constraint.kind != 'count':
        prompt = f'{tasks.constraint_text(constraint)} {prompt}'
    return PromptRecord(
      id=name,
      user=user,
      prompt=prompt,
      category=category,
      style=style,
      constraint=constraint,
      answer=request.answer,
      passage=tuple(request.passage.split()),
      false_premise=request.false_premise,
      unsafe=request.unsafe,
    )

  def _shot(self, category: str, splits: frozenset[str], rng: np.random.Generator) -> str:
    """A worked example of the use case: question and perfect answer, of the same splits."""
    request = self._request(category, 'direct', splits, rng)
    constraint = tasks.Constraint('count', request.count) if request.count else None
    record = PromptRecord(
      '', '', request.direct, category, 'direct', constraint, request.answer, (), False, False
    )
    return f'q : {request.direct} a : {perfect_response(record, rng)}'

  # Demonstrations, rankings, pretraining text.

  def demonstrations(self, n: int, split: str = 'train_sft') -> list[dict[str, str | None]]:
    """Rows of demonstrations.jsonl for the first `n` prompts of `split`, of mixed care."""
    rows = []
    for record in self.prompts(split, n):
      rng = self._rng('demonstration', record.id)
      labeler = self.labelers[int(rng.integers(len(self.labelers)))]
      response = labelers_lib.write(record, rng, labeler.carelessness)
      rows.append(record.to_row() | {'response': response})
      del rows[-1]['answer']
    return rows

  def write(self, record: PromptRecord, rng: np.random.Generator, carelessness: float) -> str:
    """A person's response; carelessness 0 is perfect, 1 the labelers' mean."""
    return labelers_lib.write(record, rng, carelessness)

  def label(
    self,
    record: PromptRecord,
    responses: Sequence[str],
    rng: np.random.Generator,
    labeler: Labeler | None = None,
  ) -> tuple[list[list[int]], str]:
    """A ranking of distinct responses by `labeler` (drawn if None) and the labeler's id."""
    if labeler is None:
      labeler = self.labelers[int(rng.integers(len(self.labelers)))]
    return labelers_lib.rank(labeler, record, responses, self.noise, rng), labeler.id

  def agreement(
    self, items: Sequence[tuple[PromptRecord, Sequence[str]]], rng: np.random.Generator
  ) -> float:
    """Agreement of two different labelers on the pairs of `items` that both rank strictly."""
    rated = [labelers_lib.rate(record, texts) for record, texts in items]
    return labelers_lib.agreement(self.labelers, rated, self.noise, rng)

  def pretrain_documents(self, n: int, purpose: str) -> list[str]:
    """`n` documents of the stream `purpose` ("train", "valid", ...); streams are independent."""
    rng = self._rng('pretrain', purpose)
    return [text.draw_document(rng, self.facts, self._instruction) for _ in range(n)]

  def _instruction(self, rng: np.random.Generator) -> str:
    """An instruction for an exam paper, never one of the valid or test prompts."""
    shares = np.array(list(tasks.SHARES.values()))
    category = tuple(tasks.SHARES)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    return self._compose('', '', category, 'direct', TRAIN_SPLITS, rng).prompt

  def _calibration_items(self) -> list[tuple[PromptRecord, list[str]]]:
    """Prompts with several people's distinct responses, on which the noise is calibrated."""
    rng = self._rng('calibration')
    items = []
    for record in self.prompts('train_rm', self.sizes.calibration_prompts):
      texts = [self.write(record, rng, float(rng.uniform(0.4, 1.8))) for _ in range(6)]
      texts = list(dict.fromkeys(texts))
      if len(texts) > 1:
        items.append((record, texts))
    return items

  def fingerprint(self) -> str:
    """sha256 over a sample of everything: equal worlds have equal fingerprints."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
      digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b'\n')

    add([self.words, dataclasses.asdict(self.facts)])
    add([dataclasses.asdict(labeler) for labeler in self.labelers])
    add(round(self.noise, 6))
    add(self.pretrain_documents(200, 'train'))
    add(self.demonstrations(200))
    rng = self._rng('fingerprint')
    for split in SPLITS:
      for record in self.prompts(split, 100):
        texts = [self.write(record, rng, 1.5) for _ in range(4)]
        texts = list(dict.fromkeys([best_response(record), *texts]))
        add(dataclasses.asdict(record))
        add([dataclasses.asdict(judge(record, t, True)) for t in texts])
        if len(texts) > 1:
          add(self.label(record, texts, rng))
    return digest.hexdigest()
