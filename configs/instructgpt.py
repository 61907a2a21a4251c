"""The paper's own settings: Ouyang et al. 2022 (arXiv 2203.02155), at 1.3B, 6B and 175B.

  python -m instructjax --config=configs/instructgpt.py:1.3b,data_dir=PATH --workdir=runs/1.3b
  python -m instructjax.plan --config=configs/instructgpt.py:175b --topology=v5p:4x8x8

Arguments: `:1.3b`, `:6b` or `:175b` is the policy, `:1.3b` by default; the reward and the value
network are the 6B ones (6.7B in Brown et al. 2020) beside every policy, as in the paper.
`data_dir=PATH` or `prepared=PATH` hold the data that `configs/real_text.py` describes.
`pretrained=PATH` and `reward_pretrained=PATH` are checkpoints of language models of the policy's
and of the reward model's size, with this run's tokenizer; without them the recipe begins by
pretraining both, with the settings of GPT-3. `:test` shrinks everything for tests.

GPT-3, its tokenizer and the paper's data are not public, and no run of these sizes has been made:
the numbers below are the paper's, what they lead to here is not known. `python -m instructjax.plan`
says what they take; the README has the plans of all three.

Each number names its source: (C.1) to (C.4) are sections of the paper's appendix, (T6), (T9), (T11)
its tables, (GPT-3) is Brown et al. 2020, table 2.1 and appendix B. "Silent" marks what the paper
does not say; the value is then the one of `configs/common.py` or has its reason beside it.
"""

from ml_collections import ConfigDict

from configs import common, real_text
from instructjax.config import parse_arg

# Facts B3: the appendix' settings of supervised fine-tuning (C.1), of the policy's start (C.3) and
# of the value network (C.4), by size of the policy.
SIZES = {
  '1.3b': {'model': '1.3b', 'sft_peak': 9.65e-6, 'init_peak': 5e-6, 'batch': 32,
           'value_peak': 9e-6, 'policy_peak': 8.05e-6},
  '6b': {'model': '6.7b', 'sft_peak': 9.65e-6, 'init_peak': 1.04e-5, 'batch': 32,
         'value_peak': 9e-6, 'policy_peak': 8.05e-6},
  '175b': {'model': '175b', 'sft_peak': 5.03e-6, 'init_peak': 2.45e-6, 'batch': 8,
           'value_peak': 5e-6, 'policy_peak': 2.55e-6},
}
# (GPT-3): peak learning rate and documents of 2,048 tokens in a batch of 1M, 2M and 3.2M tokens
# (the last rounded down to a number that splits well).
PRETRAIN = {'1.3b': (2.0e-4, 512), '6.7b': (1.2e-4, 1024), '175b': (0.6e-4, 1536)}
# Ours: devices to plan for (v5p), the part of them that splits matrix products, and microbatches of
# pretraining and of the pretraining text in PPO.
MESHES = {'1.3b': (16, 2, 8, 4), '6b': (16, 2, 16, 8), '175b': (256, 32, 48, 16)}
CONTEXT = 2048


def get_config(arg: str = '') -> ConfigDict:
  """The recipe; see the module's docstring for `arg`.

  Raises:
    ValueError: two sizes are given.
  """
  size, arg = _split(arg)
  arg = parse_arg(
    arg, data_dir='', prepared='', pretrained='', reward_pretrained='', test=False, seed=1)
  if arg.data_dir and arg.prepared:
    raise ValueError(f'data_dir={arg.data_dir} and prepared={arg.prepared}: give one of them')
  numbers = SIZES[size]
  _, tensor, pretrain_parts, ptx_parts = MESHES[size]
  c = ConfigDict()
  c.title = f'InstructGPT {size}, the settings of Ouyang et al. 2022'
  c.seed = arg.seed
  c.needs = f'see python -m instructjax.plan --config=configs/instructgpt.py:{size}'
  c.data = real_text.prepared(arg.prepared) if arg.prepared else real_text.data(arg.data_dir)
  # (B3) GPT-3's byte-pair encoding has as many tokens; here one is trained on the run's own text.
  c.tokenizer = common.tokenizer('sentencepiece')
  c.tokenizer.update({'vocab_size': 50_257, 'max_characters': 1_000_000_000})
  # (B3) Context 2k; prompts over 1k tokens are dropped, responses have at most 1k.
  c.limits = common.limits(prompt_tokens=1024, response_tokens=1024)
  # (B3, R01) GPT-3's architecture; one 6B reward model for all policies, and (P05) a separate value
  # network of its size.
  c.models = ConfigDict({
    'policy': common.model(numbers['model'], context=CONTEXT),
    'reward': common.model('6.7b', context=CONTEXT)})
  for model in c.models.values():
    # (B3) fp16 weights and activations with fp32 master weights; here bfloat16 activations, float32
    # parameters.
    model.compute_dtype = 'bfloat16'
    # Silent on all of this.
    model.remat = 'full'
    model.vocab_multiple = 128
  c.mesh = common.mesh()
  c.mesh.update({'data': 1, 'fsdp': -1, 'tensor': tensor})
  c.rules = common.network_rules()
  # While it generates, the policy is split by heads, feed-forward and vocabulary only: split over
  # fsdp as well it would be gathered for every token. That takes a copy of it on every fsdp shard,
  # for which a v5p has no room at 175B.
  if size != '175b':
    generation = common.rules()
    generation.embed = None
    c.rules.generation = generation.to_dict()
  c.tracking = common.tracking()
  c.plan = _plan(size)

  base = arg.pretrained if arg.pretrained else 'pretrain'
  c.pretrain = _pretrain(numbers['model'], 'policy', pretrain_parts)
  stages = [] if arg.pretrained else ['pretrain']
  reward_base = arg.reward_pretrained
  if not reward_base and numbers['model'] == '6.7b':
    reward_base = base
  if not reward_base:
    # The 6B language model that the reward model starts from, where the policy has another size.
    reward_base = 'pretrain_reward'
    c.pretrain_reward = _pretrain('6.7b', 'reward', MESHES['6b'][2])
    stages.append(reward_base)
  c.stages = (*stages, 'sft', 'rl_init', 'reward_model', 'select', 'ppo', 'evaluate')

  c.sft = _demonstrations(base, numbers['sft_peak'], numbers['batch'])
  # (C.1, S02) 16 epochs, residual dropout 0.2, cosine to 10 %, no warm-up.
  c.sft.train_epochs = 16.0
  c.sft.dropout = 0.2
  # (C.1, S03) The checkpoint is chosen by reward-model score; how many there were: silent. One for
  # every epoch.
  c.sft.candidates = 16

  c.rl_init = _demonstrations(base, numbers['init_peak'], numbers['batch'])
  # (C.3) 2 epochs from the pretrained model, 10 % pretraining data, cosine to 10 %.
  # Silent: dropout.
  c.rl_init.train_epochs = 2.0
  c.rl_init.pretrain_share = 0.1

  # (C.2, R03) 64 prompts a batch with all pairs of their K = 4..9 responses, one epoch, 9e-6 with a
  # cosine to 10 %, ties dropped. (C.2) It starts from a 6B GPT-3 tuned on public question-answering
  # data, and "starting from the GPT-3 or SFT models leads to similar results": here from the 6B
  # language model.
  c.reward_model = common.reward_model(
    init=reward_base, rankings='data', batch_size=64, row_length=4096, peak=9e-6)
  # Silent: what divides the loss once ties are dropped (R02), dropout.
  # (T9) The longest prompt of the reward model's data has 2,032 tokens; they are within the limits
  # of sampling here, as in C.4.
  c.reward_model.train_epochs = 1.0

  # Silent: how many prompts the checkpoint was chosen on.
  c.select = common.select(candidates='sft', reward='reward_model', prompts=512)

  c.ppo = _ppo(numbers, ptx_parts)
  c.evaluate = common.evaluate(prompts=1024)
  c.evaluate.models = ConfigDict({
    'base': (base, None), 'rl_init': ('rl_init', None), 'ppo_ptx': ('ppo', None),
    'ppo_ptx_raw': ('ppo', 'params')})
  if arg.test:
    _shrink(c)
  return c


def _split(arg: str) -> tuple[str, str]:
  """(size, the other arguments); a ConfigDict takes no name with a dot."""
  given = [item.strip() for item in arg.split(',')]
  chosen = [item for item in given if item in SIZES]
  if len(chosen) > 1:
    raise ValueError(f'config arguments {", ".join(chosen)}: give one size of the policy')
  return chosen[0] if chosen else '1.3b', ','.join(i for i in given if i not in SIZES)


def _pretrain(size: str, network: str, microbatches: int) -> ConfigDict:
  """(GPT-3): 300B tokens in documents of the whole context."""
  peak, batch_size = PRETRAIN[size]
  c = common.language(
    'pretrain', init=None, batch_size=batch_size, row_length=CONTEXT, peak=peak)
  c.network = network
  c.microbatches = microbatches
  c.train_steps = round(300e9 / CONTEXT / batch_size)
  # (GPT-3) Warm-up over 375M tokens; cosine to 10 % (over 260B tokens there, over all of them
  # here); weight decay 0.1, gradients clipped to norm 1, Adam 0.9, 0.95, 1e-8.
  c.optimizer.schedule.warmup_steps = round(375e6 / CONTEXT / batch_size)
  c.optimizer.schedule.warmup_from = 0.0
  c.optimizer.weight_decay = 0.1
  c.checkpoint_steps = 500
  return c


def _demonstrations(init: str, peak: float, batch_size: int) -> ConfigDict:
  """What (C.1) and (C.3) share. Silent: loss on the prompt, clipping, weight decay, eps."""
  return common.language(
    'demonstrations', init=init, batch_size=batch_size, row_length=CONTEXT, peak=peak)


def _ppo(numbers: dict, ptx_microbatches: int) -> ConfigDict:
  """(C.4)."""
  # (C.4) 256k episodes, 512 an iteration, minibatches of 64, one inner epoch.
  c = common.ppo(
    init='rl_init', ref='rl_init', reward='reward_model', batch_size=512,
    steps=256_000 // 512)
  c.minibatches = 8
  c.epochs = 1
  # (C.4) beta 0.02, constant (P02); no discount; clip 0.2; rollouts at temperature 1.
  c.kl_coef = 0.02
  c.gamma = 1.0
  c.clip_range = 0.2
  # (C.4, P06) 8 pretraining examples for each episode, their gradient times 27.8. Silent: whether
  # the terms are means over tokens, without which 27.8 has no unit.
  c.ptx_ratio = 8.0
  c.ptx_coef = 27.8
  c.ptx_row_length = CONTEXT
  c.ptx_microbatches = ptx_microbatches
  # Ours: episodes are packed by length, else each would take a row of prompt + response limits.
  c.row_length = CONTEXT
  # (C.4) Weights are averaged with 0.992; silent: whether by iteration or update.
  c.ema_decay = 0.992
  c.release = 'ema'
  # Silent: the policy's learning rate of the released models. Of the rates that were scanned,
  # 2.55e-6 to 2.55e-5, all over 8.05e-6 diverged without pretraining text (B7); beside 175B they
  # were 2.55e-6 and 3.74e-6.
  # (C.4) Constant after a warm-up over the first 10 iterations from 0.1 of the peak.
  c.policy_optimizer.schedule.peak = numbers['policy_peak']
  c.policy_optimizer.schedule.warmup_steps = 10
  c.policy_optimizer.schedule.warmup_from = 0.1
  # (C.4) 9e-6, 5e-6 beside the 175B policy.
  c.value_optimizer.schedule.peak = numbers['value_peak']
  # The paper chose among runs by labelers' ratings, not by KL.
  c.max_kl = 100.0
  # Silent: GAE's lambda, value clipping and coefficient, whitening, responses without an end.
  c.valid_steps = c.checkpoint_steps = 50
  return c


def _plan(size: str) -> ConfigDict:
  """What the paper says of its data; a plan has made-up rows of these numbers."""
  return common.plan(
    devices=MESHES[size][0], device='v5p',
    # Enough to fill a batch with; GPT-3's examples are whole contexts.
    documents=4096, document_tokens=(float(CONTEXT), 0.0),
    # (T6, T9, T11) 12,725 demonstrations; prompts of 408 tokens, responses of 38 where labelers
    # wrote the prompt, of 88 where customers did: 43 in all. Deviation of the latter: silent.
    demonstrations=12_725, demonstration_tokens=((408.0, 433.0), (43.0, 60.0)),
    # (T6, T9) 33,207 prompts of 199 tokens. Length of the responses: silent.
    rankings=33_207, ranking_tokens=((199.0, 334.0), (128.0, 128.0)),
    # (T6, T9) 31,144 prompts of 166 tokens. Length of the samples: silent.
    prompts=31_144, prompt_tokens=(166.0, 278.0), sampled_tokens=(128.0, 128.0))


def _shrink(c: ConfigDict) -> None:
  """Little of everything, for tests on a handful of rows; the networks still differ in size."""
  c.title += ' (test)'
  c.needs = 'a minute'
  c.tokenizer.update({'vocab_size': 400, 'max_characters': 1_000_000})
  c.limits.update({'prompt_tokens': 64, 'response_tokens': 64})
  for role, layers in (('policy', 1), ('reward', 2)):
    c.models[role].update({
      'size': 'micro', 'layers': layers, 'context': 128, 'compute_dtype': 'float32',
      'remat': 'none', 'vocab_multiple': 8})
  c.mesh.update({'data': -1, 'fsdp': 1, 'tensor': 1})
  c.plan.update({
    'devices': 1, 'device': 'cpu', 'documents': 64, 'document_tokens': (60.0, 30.0),
    'demonstrations': 64, 'demonstration_prompt_tokens': (24.0, 10.0),
    'demonstration_response_tokens': (20.0, 10.0), 'rankings': 32,
    'ranking_prompt_tokens': (24.0, 10.0), 'ranking_response_tokens': (16.0, 8.0), 'prompts': 32,
    'prompt_tokens': (24.0, 10.0), 'sampled_tokens': (40.0, 20.0)})
  for name in ('pretrain', 'pretrain_reward', 'sft', 'rl_init', 'reward_model'):
    if name not in c:
      continue
    stage = c[name]
    stage.batch_size = 8
    stage.microbatches = 1
    stage.row_length = 512 if name == 'reward_model' else 128
    stage.valid_examples = 16
    stage.train_steps = None
    stage.train_epochs = 1.0
    stage.optimizer.schedule.warmup_steps = 0
    stage.optimizer.schedule.peak = 1e-2 if name.startswith('pretrain') else 3e-3
    stage.optimizer.weight_decay = 0.0
  c.sft.candidates = 2
  c.reward_model.bias_demonstrations = 16
  c.select.prompts = 8
  c.ppo.update({
    'batch_size': 16, 'minibatches': 2, 'train_steps': 2, 'valid_prompts': 8, 'row_length': 128,
    'ptx_row_length': 128, 'ptx_ratio': 0.5, 'ptx_microbatches': 1})
  c.ppo.policy_optimizer.schedule.warmup_steps = 0
  c.ppo.valid_steps = c.ppo.checkpoint_steps = 1
  c.evaluate.update({
    'prompts': 8, 'samples': 2, 'documents': 8, 'batch_size': 16, 'best_of': (2,),
    'best_of_prompts': 8, 'resamples': 100})
