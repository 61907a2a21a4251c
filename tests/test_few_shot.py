"""Few-shot tasks: n pairs become n examples, each with the others as context and not its own."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import real_text
from instructjax.data import sources
from instructjax.data.corpus import FileCorpus
from instructjax.data.few_shot import FewShot, Form, expand, expand_prompts
from instructjax.data.rejected import Rejected
from instructjax.data.sources import Source, read_records

FORM = Form()


def task(pairs, id='t', **more):
  queries, responses = zip(*pairs)
  return FewShot(id=id, prompt='Give the sentiment of a tweet.', queries=queries,
                 responses=responses, source='s', **more)


def numbered(n):
  return [(f'query {i}.', f'response {i}.') for i in range(n)]


def test_the_example_of_the_paper():
  """Ouyang et al. 2022, appendix A.1: an instruction and several pairs of query and response."""
  pairs = [('I hated the new Batman movie!', 'Negative'), ('The food was great', 'Positive'),
           ('It rains', 'Neutral')]
  found = expand(task(pairs), FORM)
  assert [d.response for d in found] == ['Negative', 'Positive', 'Neutral']
  assert found[1].prompt == (
    'Give the sentiment of a tweet.\n\n'
    'Input:\nI hated the new Batman movie!\nOutput:\nNegative\n\n'
    'Input:\nIt rains\nOutput:\nNeutral\n\n'
    'Input:\nThe food was great\nOutput:\n')
  assert [d.id for d in found] == ['t/0', 't/1', 't/2']


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.one_of(st.none(), st.integers(0, 12)), st.integers(0, 5))
def test_n_pairs_make_n_examples(n, shots, seed):
  made = task(numbered(n))
  found = expand(made, FORM, shots=shots, seed=seed)
  assert [d.response for d in found] == [r for _, r in made.pairs]
  for i, d in enumerate(found):
    shown = [j for j in range(n) if f'response {j}.' in d.prompt]
    assert i not in shown and len(shown) == (n - 1 if shots is None else min(shots, n - 1))
    # The others keep their order, the query stands last, and each query is with its response.
    places = [d.prompt.index(f'query {j}.\nOutput:\nresponse {j}.') for j in shown]
    assert places == sorted(places)
    assert d.prompt.endswith(f'query {i}.\nOutput:\n')
  assert found == expand(made, FORM, shots=shots, seed=seed)
  prompts = expand_prompts(made, FORM, shots=shots, seed=seed)
  assert [(p.id, p.prompt) for p in prompts] == [(d.id, d.prompt) for d in found]


def test_shots_are_drawn_anew_for_each_pair_and_seed():
  made = task(numbered(12))
  few = [d.prompt for d in expand(made, FORM, shots=3, seed=0)]
  assert few != [d.prompt for d in expand(made, FORM, shots=3, seed=1)]
  shown = {tuple(j for j in range(12) if f'response {j}.' in p) for p in few}
  assert len(shown) > 6
  # Of the task alone: another task beside it changes nothing.
  assert few == [d.prompt for d in expand(task(numbered(12)), FORM, shots=3, seed=0)]
  with pytest.raises(ValueError, match='shots is -1'):
    expand(made, FORM, shots=-1)


def test_queries_that_are_empty_and_other_forms():
  found = expand(task([('', 'a joke'), ('', 'another')]), FORM)
  assert found[0].prompt == 'Give the sentiment of a tweet.\n\nOutput:\nanother\n\nOutput:\n'
  found = expand(task([('q', 'r'), ('s', 't')]), Form('Q: ', 'A: ', '\n###\n'))
  assert found[0].prompt == 'Give the sentiment of a tweet.\n###\nQ: s\nA: t\n###\nQ: q\nA: '


def test_a_user_based_task_keeps_its_application():
  made = task(numbered(2), application='a bot that sorts mail', user='u1', consent=True)
  for d in (*expand(made, FORM), *expand_prompts(made, FORM)):
    assert (d.category, d.user, d.provenance, d.consent, d.source) == (
      'a bot that sorts mail', 'u1', 'labeler', True, 's')
  assert expand(task(numbered(1), application='x', category='rewrite'), FORM)[0].category == (
    'rewrite')


def test_files_of_tasks(tmp_path):
  path = tmp_path / 'tasks.jsonl'
  rows = [
    {'prompt': 'Add.', 'pairs': [['1 1', '2'], {'query': '2 2', 'response': '4'}]},
    {'prompt': 'Add.', 'pairs': [{'input': '', 'output': 'x'}], 'application': 'sums',
     'provenance': 'customer', 'id': 'mine', 'user': 'u'},
    {'prompt': 'Add.', 'pairs': []}, {'pairs': [['a', 'b']]},
    {'prompt': 'Add.', 'pairs': [['a', 'b', 'c']]},
    {'prompt': 'Add.', 'pairs': [['a', '']]},
    {'prompt': 'Add.', 'pairs': [['a', 'b']], 'application': ['x']},
    {'prompt': 'Add.', 'queries': ['a', 'b'], 'responses': ['1', '2'], 'id': 'stored'},
    {'prompt': 'Add.', 'queries': ['a', 'b'], 'responses': ['1']}]
  path.write_text('\n'.join(map(json.dumps, rows)))
  rejected = Rejected()
  found = list(sources.read_few_shot(path, rejected))
  assert found == [
    FewShot('tasks-000001', 'Add.', ('1 1', '2 2'), ('2', '4'), 'tasks'),
    FewShot('mine', 'Add.', ('',), ('x',), 'tasks', user='u', application='sums',
            provenance='customer'),
    FewShot('stored', 'Add.', ('a', 'b'), ('1', '2'), 'tasks')]
  assert [(r.line, r.reason) for r in rejected.rows] == [
    (3, 'field pairs is missing or not a list'), (4, 'field prompt is missing'),
    (5, 'a pair is not a query and a response'), (6, 'field response is empty'),
    (7, 'field category is not text'), (9, 'queries and responses differ in number')]


def test_tasks_as_self_instruct_writes_them(tmp_path):
  path = tmp_path / 'user_oriented.jsonl'
  path.write_text(json.dumps({
    'id': 'user_oriented_task_0', 'motivation_app': 'Grammarly', 'instruction': 'Fix it.',
    'instances': [{'input': 'I is here', 'output': 'I am here'}]}) + '\n')
  source = Source(str(path), 'few_shot', 'self_instruct')
  (found,) = read_records([source], Rejected())
  assert found == FewShot('user_oriented_task_0', 'Fix it.', ('I is here',), ('I am here',),
                          'user_oriented', application='Grammarly')


def files(directory, tasks):
  """The least that a corpus of files needs, and few_shot.jsonl."""
  rows = {
    'demonstrations': [{'prompt': f'p{i}', 'response': 'r'} for i in range(20)],
    'comparisons': [{'prompt': 'p', 'responses': ['a', 'b'], 'chosen': 0, 'rejected': 1}],
    'prompts': [{'prompt': 'p'}], 'pretrain': [{'text': 't'}], 'few_shot': tasks}
  for name, found in rows.items():
    (directory / f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in found))


def test_a_corpus_has_the_examples_of_a_task_in_one_split(tmp_path):
  tasks = [{'id': f't{i}', 'prompt': f'Task {i}.', 'pairs': [[f'q{j}', f'r{i}.{j}']
            for j in range(5)]} for i in range(40)]
  files(tmp_path, tasks)
  config = real_text.data(str(tmp_path))
  found = FileCorpus(config, 0, Rejected())
  places = {}
  for split in ('train', 'valid', 'test'):
    for d in found.demonstrations(split):
      task, _, pair = d.id.partition('/')
      if pair:
        places.setdefault(task, []).append(split)
        assert d.provenance == 'labeler' and d.prompt.count('Output:') == 5
  assert sorted(map(len, places.values())) == [5] * 40
  assert all(len(set(splits)) == 1 for splits in places.values())
  assert len({splits[0] for splits in places.values()}) == 3
  config.few_shot.shots = 2
  few = FileCorpus(config, 0, Rejected()).demonstrations('train')
  assert {d.prompt.count('Output:') for d in few if '/' in d.id} == {3}
  (tmp_path / 'few_shot.jsonl').unlink()
  config = real_text.data(str(tmp_path))
  assert not [d for d in FileCorpus(config, 0, Rejected()).demonstrations('train') if '/' in d.id]
