"""Small raw files of every kind for the tests of preparing, good rows and bad ones."""

import gzip
import json
import pathlib
import random


def rows(kind: str, count: int, seed: int = 0) -> list[dict]:
  """Good rows of a kind; some share a prompt, a third has a user."""
  draw = random.Random(f'{kind} {seed}')
  return [_row(kind, i, draw) for i in range(count)]


def _row(kind: str, i: int, draw: random.Random) -> dict:
  words = [''.join(draw.choices('abcdefghij äß語', k=draw.randint(2, 9))) for _ in range(12)]
  prompt = f'Question {draw.randint(0, 60)} about {kind[:2]}?'
  row = {'id': f'{kind}-{i}', 'source': draw.choice(('one', 'two')), 'prompt': prompt}
  if draw.random() < 0.33:
    row['user'] = f'u{draw.randint(0, 9)}'
  text = ' '.join(words)
  if kind == 'pretrain':
    return {'id': row['id'], 'title': draw.choice((None, 'A title')), 'text': text}
  if kind == 'few_shot':
    return {**row, 'pairs': [[f'{text} {j}', f'answer {j}'] for j in range(draw.randint(1, 4))],
            'application': draw.choice((None, 'a bot'))}
  if kind == 'demonstrations':
    return {**row, 'response': text, 'category': draw.choice((None, 'qa'))}
  if kind == 'prompts':
    return {**row, 'prompt': f'{prompt} {text}', 'consent': True}
  if kind == 'unpaired':
    return {**row, 'response': text, 'label': draw.random() < 0.5, 'labeler': 'l1'}
  if kind == 'safety':
    return {**row, 'prompt': f'{prompt} {text}', 'response': draw.choice((None, text)),
            'prompt_safe': draw.random() < 0.5}
  k = 2 if kind == 'comparisons' else draw.randint(3, 9)
  order = draw.sample(range(k), k)
  groups = [order] if draw.random() < 0.1 else [[order[0]], order[1:]] if k > 2 else [
    [order[0]], [order[1]]]
  return {**row, 'responses': [f'{text} {i}' for i in range(k)], 'ranking': groups,
          'labeler': draw.choice((None, 'l1', 'l2')), 'margin': draw.choice((None, 0.1))}


def write(path: pathlib.Path, lines: list) -> pathlib.Path:
  """Writes rows, or lines as they are, plain or gzip by the name."""
  data = b''.join(line if isinstance(line, bytes)
                  else json.dumps(line, ensure_ascii=False).encode() + b'\n' for line in lines)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == '.gz' else data)
  return path


def write_all(directory: pathlib.Path, count: int, kinds: tuple[str, ...]) -> None:
  """A file of each kind, half of them gzip, with a few bad rows and a repeated one each."""
  for number, kind in enumerate(kinds):
    good = rows(kind, count)
    repeated = {**good[1], 'id': 'repeated'}
    bad = [b'{"half": \n', b'\xff\xfe not UTF-8\n', b'[1]\n', {'id': 'no text'}]
    lines = [*good[:count // 2], *bad[:2], *good[count // 2:], repeated, *bad[2:]]
    write(directory / f'{kind}.jsonl{".gz" if number % 2 else ""}', lines)
