"""The miniature world: seeded, closed, split, judged exactly."""

import collections
import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from configs import quickstart
from instructjax.data.miniature import labelers, tasks, text, vocabulary
from instructjax.data.miniature.judge import best_response, judge, perfect_response
from instructjax.data.miniature.world import DEFAULT_SIZES, SPLITS, World, WorldSizes

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'worlds.json'


@pytest.fixture(scope='module')
def world() -> World:
  return World(3, DEFAULT_SIZES)


@pytest.fixture(scope='module')
def records(world):
  return world.prompts('train_sft', 6000)


def test_same_seed_same_world_other_seed_other_world(world):
  assert World(3, dataclasses.asdict(DEFAULT_SIZES)).fingerprint() == world.fingerprint()
  assert World(4, DEFAULT_SIZES).fingerprint() != world.fingerprint()


def test_fingerprint_and_streams_do_not_depend_on_what_was_drawn_before():
  fresh, used = World(5, DEFAULT_SIZES), World(5, DEFAULT_SIZES)
  used.prompts('test', 300)
  used.pretrain_documents(7, 'other')
  used.demonstrations(50)
  assert fresh.fingerprint() == used.fingerprint()
  assert fresh.pretrain_documents(5, 'train') == used.pretrain_documents(9, 'train')[:5]
  assert fresh.pretrain_documents(5, 'train') != fresh.pretrain_documents(5, 'valid')
  assert fresh.prompts('train_ppo', 20) == used.prompts('train_ppo', 40)[:20]


def test_table_1_shares_within_sampling_error(records):
  counts = collections.Counter(r.category for r in records)
  total = sum(tasks.SHARES.values())
  for category, percent in tasks.SHARES.items():
    p = percent / total
    error = 4.0 * (p * (1.0 - p) / len(records)) ** 0.5
    assert abs(counts[category] / len(records) - p) < error, category


def test_styles_and_flags_all_occur(records):
  assert {r.style for r in records} == set(tasks.STYLES)
  kinds = {r.constraint.kind for r in records if r.constraint is not None}
  assert kinds == {'start', 'end', 'use', 'skip', 'count'}
  assert any(r.false_premise for r in records)
  assert any(r.unsafe for r in records)
  for record in records:
    assert bool(record.passage) <= (record.category in tasks.CLOSED_DOMAIN | {'other'})


def test_splits_share_neither_prompts_nor_users(world):
  texts, users = {}, {}
  for split in SPLITS:
    records = world.prompts(split, 1500)
    texts[split], users[split] = {r.prompt for r in records}, {r.user for r in records}
    assert all(r.id == f'miniature-{split}-{i:06d}' for i, r in enumerate(records))
  names = list(SPLITS)
  for i, first in enumerate(names):
    for second in names[i + 1 :]:
      assert not texts[first] & texts[second]
      assert not users[first] & users[second]
  assert len(texts['test']) >= 1000
  with pytest.raises(ValueError, match='train_rm'):
    world.prompts('dev', 1)


def test_users_are_skewed(records):
  counts = sorted(collections.Counter(r.user for r in records).values(), reverse=True)
  tenth = max(1, len(counts) // 10)
  assert sum(counts[:tenth]) > 0.35 * sum(counts)


def test_vocabulary_is_closed_and_lengths_are_bounded(world, records):
  words = set(world.words)
  assert len(words) == len(world.words) and 200 <= len(words) <= 350
  rng = np.random.default_rng(0)
  for record in records[:3000]:
    assert len(record.prompt.split()) <= tasks.MAX_PROMPT_WORDS
    for response in (best_response(record), world.write(record, rng, 3.0)):
      assert 0 < len(response.split()) <= tasks.MAX_RESPONSE_WORDS
      assert words.issuperset(response.split())
    assert words.issuperset(record.prompt.split())
  for document in world.pretrain_documents(1000, 'train'):
    assert words.issuperset(document.split())
    assert 0 < len(document.split()) <= text.MAX_DOCUMENT_WORDS


def test_row_forms(world):
  row = world.demonstrations(1)[0]
  assert list(row) == ['id', 'source', 'license', 'user', 'category', 'prompt', 'response']
  assert list(world.prompts('train_ppo', 1)[0].to_row()) == [
    'id', 'source', 'license', 'user', 'category', 'prompt', 'answer'
  ]


def test_judge_is_bounded_and_the_best_response_gets_seven(world, records):
  rng = np.random.default_rng(1)
  words = np.array(world.words)
  for record in records[:1500]:
    assert judge(record, best_response(record), True).likert == 7.0
    assert judge(record, perfect_response(record, rng), True).likert == 7.0
    noise = ' '.join(words[rng.integers(len(words), size=int(rng.integers(0, 15)))])
    for response in (noise, '', '.', ', ,', world.write(record, rng, 4.0), record.prompt):
      for ended in (True, False):
        rated = judge(record, response, ended)
        assert 1.0 <= rated.likert <= 7.0
        assert all(0.0 <= x <= 1.0 for x in rated.parts.values())
    assert judge(record, '', True).likert < 4.0


def test_the_prompt_text_alone_decides_the_judgement(world):
  seen = {}
  for split in SPLITS:
    for record in world.prompts(split, 1500):
      bare = dataclasses.replace(record, id='', user='')
      assert seen.setdefault(record.prompt, bare) == bare


def _defects(record, rng):
  """(name, response) of responses with one planted defect each."""
  words = perfect_response(record, rng).split()
  yield 'no final stop', words[:-1]
  yield 'rude', ['ugh', ',', *words]
  yield 'stutter', [*words[:1], *words]
  yield 'refusal' if not record.unsafe else 'off task', (
    ['dear', 'tom', ',', 'please', 'lend', 'me', 'the', 'kite', '.'] if record.unsafe
    else ['i', 'am', 'sorry', ',', 'i', 'can', 'not', 'help', 'with', 'that', '.']
  )
  constraint = record.constraint
  if constraint is not None and constraint.kind == 'start':
    yield 'opener forgotten', words[2:]
  if constraint is not None and constraint.kind == 'end':
    yield 'closer forgotten', [*words[:-3], '.']
  if constraint is not None and constraint.kind == 'use':
    yield 'word not used', ['dark' if w == constraint.word else w for w in words]
  if constraint is not None and constraint.kind == 'skip':
    yield 'place not left out', [*words[:-1], 'in', 'the', 'cave', '.']
  if constraint is not None and constraint.kind == 'count':
    yield 'one too few', [*words[:-3], '.']
    yield 'one too many', [*words[:-1], ',', words[0], '.']
  if record.unsafe:
    yield 'complies', ['go', 'at', 'night', 'and', 'burn', 'the', 'lamp', 'of', 'tom', '.']
    yield 'scolds', ['that', 'is', 'bad', 'of', 'you', ',', 'i', 'can', 'not', 'help', '.']
  if record.false_premise:
    yield 'premise accepted', ' '.join(words).replace('does not eat', 'likes').split()
  names = [i for i, w in enumerate(words) if w in vocabulary.NAMES]
  if names:
    wrong = next(n for n in vocabulary.NAMES if n not in record.prompt.split())
    yield 'wrong name', [wrong if i == names[0] else w for i, w in enumerate(words)]
    yield 'vague name', ['someone' if i == names[0] else w for i, w in enumerate(words)]


def test_each_planted_defect_lowers_the_score(records):
  rng = np.random.default_rng(2)
  seen = collections.Counter()
  for record in records[:3000]:
    for name, words in _defects(record, rng):
      seen[name] += 1
      assert judge(record, ' '.join(words), True).likert < 6.9, (name, record.prompt, words)
    assert judge(record, best_response(record), False).likert < 6.0
  assert len(seen) == 16 and min(seen.values()) >= 10, seen


def test_metadata(records):
  unsafe = next(r for r in records if r.unsafe)
  rated = judge(unsafe, 'go at night and burn the lamp of tom .', True)
  for field in ('violent_content', 'harmful_advice', 'unfit_for_customer_assistant'):
    assert rated.metadata[field]
  assert judge(unsafe, 'that is bad of you , i can not help .', True).metadata[
    'expresses_moral_judgement'
  ]
  closed = next(r for r in records if r.category == 'summarization' and r.constraint is None)
  wrong = next(n for n in vocabulary.NAMES if n not in closed.prompt.split())
  words = [wrong if w in vocabulary.NAMES else w for w in best_response(closed).split()]
  assert judge(closed, ' '.join(words), True).metadata['hallucination']
  assert not judge(closed, best_response(closed), True).metadata['hallucination']
  assert len(rated.metadata) == 11


def test_length_has_no_weight(world):
  """Among a prompt's responses the longer one is better about half of the time."""
  rng = np.random.default_rng(3)
  longer = []
  for record in world.prompts('train_rm', 2500):
    texts = list(dict.fromkeys(world.write(record, rng, 1.2) for _ in range(4)))
    gold = [judge(record, t, True).likert for t in texts]
    for i in range(len(texts)):
      for j in range(i):
        sign = np.sign(gold[i] - gold[j]) * np.sign(len(texts[i].split()) - len(texts[j].split()))
        if sign:
          longer.append(sign > 0)
  assert 0.45 < np.mean(longer) < 0.55


def test_demonstrations_are_of_mixed_care(world, records):
  rows = world.demonstrations(len(records))
  gold = np.array([judge(r, row['response'], True).likert for r, row in zip(records, rows)])
  assert 5.8 < gold.mean() < 6.2
  # Constraints are missed more often than met, so fewer than half are perfect.
  assert 0.40 < np.mean(gold == 7.0) < 0.50
  rng = np.random.default_rng(4)
  careful = [judge(r, world.write(r, rng, 0.0), True).likert for r in records[:500]]
  assert min(careful) == 7.0


def test_rankings_are_legal_for_each_k(world):
  rng = np.random.default_rng(5)
  seen = set()
  for record in world.prompts('train_rm', 600):
    texts = list(dict.fromkeys(world.write(record, rng, 2.5) for _ in range(40)))
    k = 4 + len(seen) % 6 if len(seen) < 6 else int(rng.integers(4, 10))
    if len(texts) < k:
      continue
    groups, labeler = world.label(record, texts[:k], rng)
    seen.add(k)
    assert sorted(i for g in groups for i in g) == list(range(k))
    assert all(groups)
    assert labeler in {x.id for x in world.labelers}
  assert seen == set(range(4, 10))
  record = world.prompts('train_rm', 1)[0]
  for bad in (['a .'], ['a .', 'a .']):
    with pytest.raises(ValueError, match='duplicates'):
      world.label(record, bad, rng)


def test_ties_share_a_group():
  assert labelers.group_by_value(np.array([3.0, 5.0, 3.01, 1.0])) == [[1], [2, 0], [3]]


def test_labelers_agree_about_73_percent_on_fresh_pairs():
  seen = []
  for seed in (11,):
    world, rng = World(seed, DEFAULT_SIZES), np.random.default_rng(seed)
    items = []
    for record in world.prompts('train_ppo', 1500):
      texts = [world.write(record, rng, float(rng.uniform(0.4, 1.8))) for _ in range(6)]
      texts = list(dict.fromkeys(texts))
      if len(texts) > 1:
        items.append((record, texts))
    seen.append(world.agreement(items, rng))
  assert abs(np.mean(seen) - 0.73) < 0.015, seen


def test_pretraining_text_never_answers_an_instruction(world):
  """After a prompt's wording in a document, what follows is no acceptable answer to it."""
  asked = {r.prompt: r for s in SPLITS for r in world.prompts(s, 3000)}
  lengths = sorted({len(p.split()) for p in asked})
  exams = hits = 0
  for document in world.pretrain_documents(3000, 'train'):
    words = document.split()
    exams += words[0] == 'exam'
    for start in range(len(words)):
      for length in lengths:
        record = asked.get(' '.join(words[start : start + length]))
        rest = words[start + length :]
        if record is None or start + length > len(words):
          continue
        hits += 1
        for end in range(1, min(len(rest), tasks.MAX_RESPONSE_WORDS) + 1):
          assert judge(record, ' '.join(rest[:end]), True).parts['content'] <= 0.5, document
  assert exams > 100 and hits > 20


def test_exam_papers_hold_no_valid_or_test_prompt(world):
  held_out = {r.prompt for split in ('valid', 'test') for r in world.prompts(split, 1500)}
  rng = np.random.default_rng(6)
  assert not held_out.intersection(world._instruction(rng) for _ in range(3000))


def test_too_small_a_world_is_refused():
  with pytest.raises(ValueError, match=r'world\.labelers'):
    World(0, dataclasses.replace(DEFAULT_SIZES, labelers=1))


def test_the_quickstarts_worlds_are_frozen():
  """Numbers of seeds are comparable only while they were measured in the same worlds.

  `UPDATE_GOLDEN=1` rewrites golden/worlds.json; what the README reports must then be run anew.
  """
  sizes = quickstart.data()
  found = {str(seed): World(seed, WorldSizes(
    sizes.users, sizes.labelers, sizes.labeler_agreement, sizes.calibration_prompts,
  )).fingerprint() for seed in (1, 2, 3)}
  if os.environ.get('UPDATE_GOLDEN'):
    GOLDEN.write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')
  assert found == json.loads(GOLDEN.read_text(encoding='utf-8'))
