"""Raw files to a prepared directory, which recipes read with `data.kind = 'prepared'`.

  python -m instructjax.data prepare --config=configs/prepare.py:data_dir=PATH --out=prepared

PATH holds files named after their kind, as in `demonstrations.jsonl.gz`, `rankings.csv` or
`prompts.parquet`. Single kinds lie anywhere with `demonstrations=FILE`, also a pattern or
`tfds:NAME`. `:rules` puts the rules of the paper's prompt set on top, which also split by user.

For rows of another form, copy this file and change what `source` gives:

  mine = common.source('rankings', 'dumps/votes-*.jsonl.gz')
  mine.form = 'hh'
  mine.constants = {'consent': True, 'provenance': 'customer'}
  c.sources = (mine,)
"""

import pathlib

from ml_collections import ConfigDict

from configs import common
from instructjax.config import parse_arg
from instructjax.data.kinds import KINDS, WITHOUT_PROMPTS, files_of_kind


def get_config(arg: str = '') -> ConfigDict:
  """What to prepare; see the module's docstring for `arg`."""
  arg = parse_arg(arg, data_dir='', rules=False, **dict.fromkeys(KINDS, ''))
  c = common.prepare()
  found = []
  for kind in KINDS:
    if arg[kind]:
      found.append(common.source(kind, arg[kind]))
    elif arg.data_dir:
      found += [common.source(kind, str(path))
                for path in files_of_kind(pathlib.Path(arg.data_dir), kind)]
  c.sources = tuple(found)
  if arg.rules:
    # A prompt may have several demonstrations and labels, but is answered once in an epoch of PPO.
    c.rules = ConfigDict({
      kind: common.prompt_rules(repeats='prompt' if kind == 'prompts' else 'row')
      for kind in KINDS if kind not in WITHOUT_PROMPTS})
  return c
