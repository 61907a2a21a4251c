"""A recipe for `python -m instructjax`: three updates of every training stage from one checkpoint.

  --config=tests/recipe_of_updates.py:CHECKPOINT      the directory of one step, `small.save_fresh`

The rankings are those that `make_rankings` has put where stage `collect` would have. `witness`
writes down what the stages are fed, where it is asked to.
"""

import gzip
import json

import numpy as np
import small
import witness

STAGES = ('sft', 'reward_model', 'dpo', 'ppo')
STEPS = 3


def get_config(checkpoint):
  """sft, reward_model, dpo and ppo, each from `checkpoint`."""
  witness.install()
  config = small.recipe(
    'test,dpo', stages=STAGES,
    # The rankings are not of this sft, so that it can go on.
    collect__policy=checkpoint,
    sft__init=checkpoint, sft__candidates=0, sft__dropout=0.1, sft__pretrain_share=0.25,
    reward_model__init=checkpoint, reward_model__ema_decay=0.0, reward_model__batch_size=8,
    dpo__init=checkpoint, dpo__ref=checkpoint, dpo__batch_size=8,
    ppo__init=checkpoint, ppo__ref=checkpoint, ppo__reward=checkpoint, ppo__batch_size=8,
    ppo__valid_prompts=8, ppo__valid_steps=0, ppo__ptx_ratio=1, ppo__minibatches=1,
    ppo__rollout_slots=4, ppo__row_length=128,
    ppo__reward_functions=(('length', 0.1, 'recipe_of_updates:length'),)).unlock()
  # Whole on every device while it samples, so that it is brought over from the others.
  config.rules.generation = {**config.rules.policy, 'embed': None}
  for stage in STAGES:
    config[stage].train_steps = STEPS
    if 'train_epochs' in config[stage]:
      config[stage].train_epochs = None
    config[stage].log_steps = 1
  optimizers = [config[stage].optimizer for stage in ('sft', 'reward_model', 'dpo')]
  for optimizer in [*optimizers, config.ppo.policy_optimizer, config.ppo.value_optimizer]:
    # Adam makes a full step of the rounding noise in a zero gradient; so large an eps does not.
    optimizer.eps = 1.0
    optimizer.schedule.peak = 0.1
    optimizer.schedule.warmup_steps = 0
  return config


def make_rankings(ctx, workdir):
  """A complete stage `collect` in `workdir`: people's responses, ranked by the labelers."""
  rng, directory = np.random.default_rng(0), workdir / 'collect'
  directory.mkdir(parents=True)
  for split, purpose in (('train', 'rank'), ('valid', 'rank_valid')):
    with gzip.open(directory / f'{split}.jsonl.gz', 'wt', encoding='utf-8') as file:
      for number, prompt in enumerate(ctx.corpus.prompts(purpose)):
        responses = list(dict.fromkeys(ctx.corpus.demonstrate(prompt, rng) for _ in range(4)))
        if len(responses) < 2:
          continue
        ranking, labeler = ctx.corpus.rank(prompt, responses, rng)
        file.write(json.dumps({
          'id': f'{split}-{number}', 'source': 'test', 'category': prompt.category,
          'prompt': prompt.prompt, 'responses': responses, 'ranking': ranking,
          'labeler': labeler}) + '\n')
  (directory / 'summary.json').write_text('{"complete": true}')


def length(prompt, response, row):
  """A reward that the host computes."""
  del prompt, row
  return len(response) / 100
