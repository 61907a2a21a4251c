"""The recipe of the kill harness: every kind of stage, few steps, checkpoints all the time."""

import small

from instructjax.config import parse_arg

STEPS = 6


def get_config(arg: str = ''):
  """`steps=N` for each training stage; a checkpoint after every second, a line after every one."""
  steps = parse_arg(arg, steps=STEPS).steps
  fields = {}
  for stage in ('pretrain', 'sft', 'reward_model', 'ppo'):
    fields |= {f'{stage}__train_steps': steps, f'{stage}__checkpoint_steps': 2,
               f'{stage}__log_steps': 1, f'{stage}__valid_steps': 3}
  c = small.recipe(
    stages=('pretrain', 'sft', 'collect', 'reward_model', 'ppo'), sft__candidates=2,
    sft__dropout=0.1, reward_model__init='sft', ppo__init='sft', ppo__ref='sft',
    ppo__batch_size=8, ppo__minibatches=2, ppo__ptx_ratio=1, ppo__kl_target=1.0,
    ppo__kl_horizon=40.0, ppo__valid_prompts=8, ppo__release='ema', ppo__timing_steps=2,
    # So few steps must teach a policy to end its responses, or there is nothing to rank.
    pretrain__optimizer__schedule__peak=0.02, sft__optimizer__schedule__peak=0.02,
    limits__response_tokens=12, collect__demonstration_share=1.0, collect__min_responses=2,
    collect__max_responses=4,
    collect__batch_size=32, reward_model__batch_size=4, reward_model__bias_demonstrations=8,
    tracking__tensorboard=True, **fields)
  return c.copy_and_resolve_references()
