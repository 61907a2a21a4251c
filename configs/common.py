"""The sub-configs that recipes are made of. Every default of the system stands here or in a recipe.

A recipe (`quickstart.py`, `real_text.py`) calls these and changes what it needs; the result is
locked, so an unknown field is an error.
"""

from ml_collections import ConfigDict, config_dict

placeholder = config_dict.placeholder


def model(size: str, *, context: int) -> ConfigDict:
  """One network's architecture (`instructjax/models/presets.py` holds the sizes)."""
  c = ConfigDict()
  # Named size: 125m .. 175b as Brown et al. 2020, table 2.1; micro, tiny, mini, small are ours.
  c.size = size
  # Override a single number of the size; None takes the size's own.
  c.layers = placeholder(int)
  c.width = placeholder(int)
  c.heads = placeholder(int)
  # Standard deviation of the initial weights; None takes the size's own.
  c.init_std = placeholder(float)
  # Positions: prompt + response of each branch must fit, a whole row need not. Tokens.
  c.context = context
  # Residual dropout in [0, 1) where a stage trains with it; stages set their own rate.
  c.dropout = 0.0
  # Activations: 'float32' or 'bfloat16'. Parameters, losses and log-probs are float32 always.
  c.compute_dtype = 'float32'
  # How a row's attention is computed: 'plain' forms all logits, 'chunked' a chunk at a time (less
  # memory; on a CPU as fast from rows of 4096 tokens on), 'splash' is a TPU's kernel,
  # 'cudnn' an NVIDIA GPU's (bfloat16 only). 'auto' takes one by platform and length; a name that
  # cannot run is an error. What was taken is in summary.json.
  c.attention = 'auto'
  # What the backward pass keeps of a layer: 'none' keeps all, 'dots' matmuls, 'full' recomputes.
  c.remat = 'none'
  # MiB of a device's float32 logits that the head keeps for the backward pass, and as much again
  # for their gradient; where there are more it runs in chunks of a quarter of this and computes
  # them twice, a third more work of the head's. 4096 suits an accelerator with 80 GB.
  c.logits_mib = 256
  # The vocabulary is padded to a multiple of this; 128 x the tensor axis suits an accelerator.
  c.vocab_multiple = 8
  return c


def mesh() -> ConfigDict:
  """Devices: copies (data) x parameter shards (fsdp) x split matmuls (tensor); one may be -1."""
  c = ConfigDict()
  c.data = -1
  c.fsdp = 1
  c.tensor = 1
  return c


def rules() -> ConfigDict:
  """Logical parameter axis -> mesh axis, or None for not split."""
  c = ConfigDict()
  c.embed = 'fsdp'
  c.heads = 'tensor'
  c.head_width = None
  c.mlp = 'tensor'
  c.vocab = 'tensor'
  c.position = None
  c.norm = None
  c.layers = None
  return c


def network_rules() -> ConfigDict:
  """Rules of each network, and of the policy while it generates (None: as it trains)."""
  return ConfigDict({
    'policy': rules(), 'reward': rules(), 'value': rules(), 'generation': placeholder(dict)})


def tokenizer(kind: str) -> ConfigDict:
  """From text to token ids; stored in the run's directory, so that a run is complete in itself."""
  c = ConfigDict()
  # 'sentencepiece': the model file `path`, or where that is None one trained on the run's own text;
  # 'huggingface': a tokenizer.json (extra `tokenizers`); 'saved': that of another run, path
  # RUN/tokenizer; 'byte': UTF-8 bytes; 'world': the words of the miniature world.
  c.kind = kind
  c.path = placeholder(str)
  # Special tokens of a file, by name; None takes the file's own. Pad must be another than begin and
  # end: for Llama's models, which have none, say pad = '<unk>'.
  c.begin = placeholder(str)
  c.end = placeholder(str)
  c.pad = placeholder(str)
  # Names of special tokens to put behind the vocabulary of a file; and ('huggingface') of those
  # that a text may spell out, as a chat template does. All others are encoded as characters.
  c.added = ()
  c.in_text = ()
  # Sentencepiece that is trained here: pieces at most, and characters to train on at most.
  c.vocab_size = 4096
  c.max_characters = 20_000_000
  # Pairs of prompt and response, of each kind of data, that are also encoded together, to say where
  # that gives other tokens than training sees; 0 = none.
  c.checked_pairs = 2_000
  return c


def limits(*, prompt_tokens: int, response_tokens: int) -> ConfigDict:
  """Longest prompt and response in tokens, specials included; longer data rows are set aside."""
  c = ConfigDict()
  c.prompt_tokens = prompt_tokens
  c.response_tokens = response_tokens
  # A longer prompt: False sets its row aside, as the paper does; True keeps its last tokens.
  c.truncate_prompts = False
  # A ranking with a response that does not fit: True drops that response, False the ranking.
  c.drop_long_responses = True
  return c


def prompt_rules(*, repeats: str = 'prompt') -> ConfigDict:
  """What rows must pass, and their splits (`instructjax/data/apply_rules.py`)."""
  c = ConfigDict()
  # Names, in order. 'consent': a row whose consent is not true is refused. 'provenance': as
  # refuse_provenance. 'repeats': one of all prompts that share a long prefix. 'cap': so many rows
  # of a user. 'personal': no personal data in the training split.
  c.rules = ('repeats', 'cap', 'personal')
  # Words for where a prompt comes from; 'unknown' stands for rows that do not say.
  c.refuse_provenance = ('labeler',)
  # Characters from which a common prefix is long; the paper does not give its number.
  c.prefix_characters = 200
  # Rows with the whole prompt of a kept one: 'prompt' drops them, 'row' only those that say the
  # same altogether, so that a prompt may have several responses, or labels.
  c.repeats = repeats
  # Rows of one 'user' or 'organisation' (users without one: each).
  c.cap = 200
  c.cap_by = 'organisation'
  # Share of the users, or of the prompts of rows without one; another salt, another split.
  c.splits = ConfigDict({'train': 0.8, 'valid': 0.12, 'test': 0.08})
  c.salt = 'splits'
  # 'patterns', 'presidio' (extra `pii`) or both; the splits they look at; True: responses too.
  c.personal_finders = ('patterns',)
  c.personal_splits = ('train',)
  c.personal_responses = False
  return c


def few_shot() -> ConfigDict:
  """How tasks of few_shot.jsonl are written out as demonstrations, one for each pair."""
  c = ConfigDict()
  # What stands before a query, before a response, and between instruction and pairs.
  c.query = 'Input:\n'
  c.response = 'Output:\n'
  c.between = '\n\n'
  # Other pairs that are shown before a query, drawn anew for each; None: all.
  c.shots = placeholder(int)
  c.seed = 0
  return c


def tracking() -> ConfigDict:
  """Where metrics go besides metrics.jsonl."""
  c = ConfigDict()
  c.tensorboard = True
  # Weights & Biases, on where a project is named; needs the extra `tracking`. mode: 'online',
  # 'offline'. A stage is a run, its name that of the stage.
  c.wandb = ConfigDict({'mode': 'online'})
  for field in ('project', 'entity', 'group'):
    c.wandb[field] = placeholder(str)
  # Peak TFLOP/s of a device, for the metric fraction_of_peak; None: as its data sheet says (dense
  # bfloat16), and no such metric on a device that is not in `instructjax/models/flops.py`.
  c.device_tflops = placeholder(float)
  return c


def plan(
  *, devices: int, device: str, documents: int, document_tokens: tuple, demonstrations: int,
  demonstration_tokens: tuple, rankings: int, ranking_tokens: tuple, prompts: int,
  prompt_tokens: tuple, sampled_tokens: tuple, ranking_responses: tuple = (4, 9),
) -> ConfigDict:
  """What `python -m instructjax.plan` goes by. Nothing of it changes a run.

  Args:
    devices, device: to plan for.
    documents, demonstrations, rankings, prompts: rows of each kind that are trained on.
    *_tokens: mean and standard deviation of their lengths, special tokens included; two pairs,
      prompt and response, of demonstrations and rankings. `sampled_tokens` are the responses of
      the policy.
    ranking_responses: fewest and most responses of a ranking.
  """
  c = ConfigDict()
  # Devices, of those in `instructjax/plan/devices.py`; a --topology stands before both.
  c.devices, c.device = devices, device
  # Assumption: the share of the peak FLOP/s that training and scoring reach on filled rows.
  c.flop_utilisation = 0.4
  # Assumption: the share of the memory's bandwidth that sampling reaches.
  c.bandwidth_utilisation = 0.6
  # Share of the memory that is to stay free.
  c.memory_margin = 0.05
  # Assumption: US dollars for an hour of a device, on demand at list price; look up your own.
  c.price_per_device_hour = ConfigDict({
    'v4': 3.22, 'v5e': 1.20, 'v5p': 4.20, 'v6e': 2.70, 'a100-40': 3.67, 'a100-80': 5.07,
    'h100': 11.06, 'h200': 10.85, 'cpu': 0.0})
  # Tokens of the vocabulary where the tokenizer's config does not say (`tokenizer.vocab_size`).
  c.vocab_size = placeholder(int)
  c.documents, c.document_tokens = documents, document_tokens
  c.demonstrations = demonstrations
  c.demonstration_prompt_tokens, c.demonstration_response_tokens = demonstration_tokens
  c.rankings, c.ranking_responses = rankings, ranking_responses
  c.ranking_prompt_tokens, c.ranking_response_tokens = ranking_tokens
  c.prompts, c.prompt_tokens, c.sampled_tokens = prompts, prompt_tokens, sampled_tokens
  return c


def optimizer(peak: float, *, shape: str = 'cosine') -> ConfigDict:
  """Adam for one role."""
  c = ConfigDict()
  c.schedule = ConfigDict()
  # Peak learning rate.
  c.schedule.peak = peak
  # After the warm-up: 'constant', 'cosine' or 'linear' down to final_fraction of the peak.
  c.schedule.shape = shape
  c.schedule.final_fraction = 0.1
  # Outer steps (PPO: iterations, not updates) of linear rise from warmup_from x peak.
  c.schedule.warmup_steps = 0
  c.schedule.warmup_from = 0.1
  # Outer steps before this one leave the role untouched (critic warm-up, for the policy).
  c.schedule.start_step = 0
  # Adam; the paper gives the betas and not eps.
  c.b1 = 0.9
  c.b2 = 0.95
  c.eps = 1e-8
  # Decoupled, on matrices and tables only.
  c.weight_decay = 0.0
  # Largest norm of the role's whole gradient; None: not clipped.
  c.clip_norm = 1.0
  return c


def spike() -> ConfigDict:
  """What becomes of an update that stands out (`instructjax/spikes.py`)."""
  c = ConfigDict()
  # 'off'; 'skip': the update is left out, counted and told; 'stop': the state before it is saved,
  # its batch written aside, and the run ends.
  c.action = 'off'
  # It stands out where its loss or gradient norm is so many deviations above the running mean,
  # over the last `window` updates or so; the first `window` are not judged. The numbers are those
  # of OLMo-core's SkipStep.
  c.factor = 6.0
  c.window = 128
  return c


def watch() -> ConfigDict:
  """Limits of what looks like reward hacking, judged at each validation (`evaluators/hacking.py`).

  Against the reference's responses to the same prompts. One that is passed is told once, and is in
  summary.json and the report.
  """
  c = ConfigDict()
  # Validation KL, nats a response; None: max_kl, beyond which nothing is released.
  c.kl = placeholder(float)
  # Mean length of the responses, entropy of a token and share of responses that end, as shares of
  # what they were. A healthy quickstart keeps 1.04, 0.55 and 0.99 of them.
  c.shortest = 0.5
  c.longest = 2.0
  c.entropy = 0.2
  c.end_rate = 0.8
  # A phrase of up to three words (with begin and end of the response as words) that came into
  # fashion: in this share of the responses, and so many times as often as at the start.
  c.phrase_rate = 0.25
  c.phrase_lift = 3.0
  # Phrases whose share of responses is logged at each validation, as 'as an ai'.
  c.phrases = ()
  # Names of limits that end the run: 'kl', 'length', 'entropy', 'end_rate', 'phrases'.
  c.stop = ()
  return c


def _training(kind: str) -> ConfigDict:
  c = ConfigDict()
  c.kind = kind
  # Each batch is computed in this many sequential parts; the result is the same.
  c.microbatches = 1
  # Steps between lines of metrics.jsonl, validations and checkpoints; 0 = only at the end.
  c.log_steps = 20
  c.valid_steps = 0
  c.checkpoint_steps = 100
  c.spike = spike()
  return c


def language(
  examples: str, *, init: str | None, batch_size: int, row_length: int, peak: float
) -> ConfigDict:
  """A next-token stage: pretraining on text, or supervised fine-tuning on demonstrations."""
  c = _training('language')
  # 'pretrain' text or 'demonstrations'.
  c.examples = examples
  # Which of `models` is trained: 'policy', or 'reward' where the reward model has another size
  # than the policy and so needs a language model of its own to start from.
  c.network = 'policy'
  # Where the parameters come from: a stage's name, the path of a checkpoint, None = fresh.
  c.init = placeholder(str) if init is None else init
  # Documents or demonstrations in a batch; and tokens in a packed row.
  c.batch_size = batch_size
  c.row_length = row_length
  # Length of the stage in passes over its examples; train_steps, where given, stands before it.
  c.train_epochs = 1.0
  c.train_steps = placeholder(int)
  # 'token': mean over tokens; 'response': mean over demonstrations of their per-token mean.
  c.unit = 'token'
  # Weight of prompt tokens in the loss of demonstrations; the paper does not say, 0 = none.
  c.prompt_loss = 0.0
  # Coefficient of log(normaliser)^2; 0 = off.
  c.z_loss = 0.0
  # Residual dropout; the paper fine-tunes with 0.2.
  c.dropout = 0.0
  # ((source, weight), ...): shares of the stage's own examples in every batch, however many rows
  # there are of each; all sources must be named. (): each has as many as it has rows.
  c.source_weights = ()
  # Share of the batch's documents that is pretraining text, in [0, 1); and what each of its tokens
  # weighs beside 1 for a response token (with unit 'response': a document beside a response).
  c.pretrain_share = 0.0
  c.pretrain_weight = 1.0
  # Checkpoints kept at equal distances for `select` to choose from; 0 keeps only the last.
  c.candidates = 0
  # Held-out documents or demonstrations for validation.
  c.valid_examples = 512
  c.optimizer = optimizer(peak)
  return c


def collect(policy: str) -> ConfigDict:
  """Responses to prompts, ranked by the labelers of the miniature world."""
  c = ConfigDict()
  c.kind = 'collect'
  # Stage whose loss-best candidate answers, at temperature 1.
  c.policy = policy
  # A second source of responses, and its share; the rest comes from `policy`.
  c.other_policy = 'pretrain'
  c.other_share = 0.1
  # Share of rankings that also hold the demonstration of a labeler.
  c.demonstration_share = 0.15
  # Responses in one call of the sampler.
  c.batch_size = 1024
  # Distinct responses of a ranking, drawn uniformly: the paper's K.
  c.min_responses = 4
  c.max_responses = 9
  return c


def reward_model(*, init: str, rankings: str, batch_size: int, row_length: int, peak: float):
  """A reward model on rankings of K responses."""
  c = _training('reward_model')
  # The checkpoint whose head is replaced.
  c.init = placeholder(str) if init is None else init
  # Where the rankings come from: a `collect` stage, or 'data' for the recipe's own files.
  c.rankings = rankings
  # Prompts (not pairs, not responses) in a batch; tokens in a packed row.
  c.batch_size = batch_size
  c.row_length = row_length
  # Longest prompt and response of a ranking in tokens; None takes those of `limits`, which are also
  # those of sampling, where a token costs more.
  c.prompt_tokens = placeholder(int)
  c.response_tokens = placeholder(int)
  c.train_epochs = 1.0
  c.train_steps = placeholder(int)
  # 'normal': N(0, 1/(D+1)); 'zero'.
  c.head_init = 'normal'
  # 'kept': mean over the pairs of a prompt that are not ties; 'all': divisor C(K,2); 'pair': mean
  # over all kept pairs of the batch.
  c.pair_divisor = 'kept'
  # Labelers who ranked the same responses: True averages their labels, so that a response comes
  # once in an epoch; False trains on each labeler's row.
  c.merge_labels = True
  # Subtracted from each preferred score gap, in score units (Llama 2's margin, one for all pairs).
  c.margin = 0.0
  c.dropout = 0.0
  # Average of the weights over steps, validated and released in their place; 0: the weights.
  c.ema_decay = 0.0
  # Held-out rankings that are watched in training (the report takes all of them), and
  # demonstrations whose mean score becomes 0 by the stored bias.
  c.valid_examples = 512
  c.bias_demonstrations = 512
  c.optimizer = optimizer(peak)
  return c


def kfold(settings: str) -> ConfigDict:
  """A reward model for each group of labelers, from the labels of the others (facts L04)."""
  c = ConfigDict()
  c.kind = 'kfold'
  # The reward-model sub-config whose settings, rankings and start are used.
  c.settings = settings
  # Groups of labelers, and seeds: of groups, held-out prompts, head and order.
  c.folds = 5
  c.seeds = 3
  # Share of the prompts that no model of a seed learns from.
  c.held_out_share = 0.2
  # Sources whose rankings are taken; (): all that name their labelers.
  c.sources = ()
  return c


def noise(settings: str) -> ConfigDict:
  """What wrong labels cost a reward model, and whether bad labelers are found (facts L09)."""
  c = ConfigDict()
  c.kind = 'noise'
  # The reward-model sub-config whose settings and start are used; rankings of data.kind 'panel'.
  c.settings = settings
  c.seeds = 3
  c.held_out_share = 0.2
  # Shares of the training rankings that are turned round.
  c.flip_rates = (0.0, 0.1, 0.2, 0.3, 0.4)
  # Shares of the labelers who are bad, and how: 'turned' turn all their rankings round, 'drawn'
  # draw them. Each is trained with them, and again without those whom the detector names.
  c.bad_shares = (0.1, 0.3)
  c.bad_kind = 'turned'
  # Probability from which on a labeler is named as bad.
  c.sure = 0.9
  return c


def panel(*, prompts: int, labels_each: int) -> ConfigDict:
  """Rankings by simulated labelers of what people wrote, for data.kind 'panel'."""
  c = ConfigDict()
  # Prompts, distinct responses to each, labelers who rank each.
  c.prompts = prompts
  c.min_responses = 4
  c.max_responses = 9
  c.labels_each = labels_each
  # How far apart the labelers' tastes are, times the miniature world's own.
  c.style_spread = 1.0
  c.valid_fraction = 0.1
  return c


def select(*, candidates: str, reward: str, prompts: int) -> ConfigDict:
  """The SFT checkpoint with the best reward-model score on validation prompts (facts S03)."""
  c = ConfigDict()
  c.kind = 'select'
  c.candidates = candidates
  c.reward = reward
  c.prompts = prompts
  c.samples = 1
  return c


def ppo(*, init: str, ref: str, reward: str, batch_size: int, steps: int) -> ConfigDict:
  """PPO, or PPO-ptx where ptx_coef > 0."""
  c = _training('ppo')
  c.log_steps = 1
  # Where the policy starts, the KL reference, and the reward model (also the value's start).
  c.init = placeholder(str) if init is None else init
  c.ref = ref
  c.reward = reward
  # Weight of the reward model in the score, and other parts: a tuple of (name, weight,
  # 'module:function') of Python functions (prompt, response, row) -> float.
  c.reward_weight = 1.0
  c.reward_functions = ()
  # Prompts whose provenance is one of these words are set aside: the paper trains on customers'
  # prompts alone. Rows that do not say pass, unless 'unknown' is named; () refuses none.
  c.refuse_provenance = ('labeler',)
  # Episodes of an iteration, and iterations.
  c.batch_size = batch_size
  c.train_steps = steps
  # Inner epochs over an iteration's episodes, and optimizer updates of an epoch.
  c.epochs = 1
  c.minibatches = 8
  # Discount and GAE's lambda. The paper does not print lambda; 0.95 is Stiennon et al. 2020's.
  c.gamma = 1.0
  c.gae_lambda = 0.95
  c.clip_range = 0.2
  # None: the value loss is not clipped. Score units.
  c.value_clip_range = 0.2
  c.value_coef = 1.0
  c.entropy_coef = 0.0
  # KL penalty inside the reward, in score units a nat; kl_target (nats a response) adapts it.
  c.kl_coef = 0.02
  c.kl_target = placeholder(float)
  c.kl_horizon = 10_000.0
  # A differentiable KL term besides: 'none', 'k2', 'k3', 'exact'.
  c.kl_loss = 'none'
  c.kl_loss_coef = 0.0
  # score <- clip((score - score_bias) * score_scale, +-score_clip). The reward model's own bias is
  # already in its head.
  c.score_bias = 0.0
  c.score_scale = 1.0
  c.score_clip = placeholder(float)
  # A response without end-of-text: subtract this, or (not None) give it this score instead.
  c.missing_end_penalty = 1.0
  c.missing_end_score = placeholder(float)
  c.whiten_rewards = False
  # Scope of mean and deviation: 'none', 'minibatch', 'batch'.
  c.whiten_advantages = 'minibatch'
  # 'token': mean over response tokens; 'sequence': sum over a response, mean over responses.
  c.unit = 'token'
  # Pretraining: coefficient of the term's mean over 'token's or 'sequence's, documents for each
  # episode, microbatches of each minibatch, tokens in a packed row.
  c.ptx_coef = 27.8
  c.ptx_unit = 'token'
  c.ptx_ratio = 8.0
  c.ptx_microbatches = 1
  c.ptx_row_length = 96
  # Rollouts: the policy's own distribution. Others are refused.
  c.temperature = 1.0
  c.top_k = 0
  c.top_p = 1.0
  # Responses that grow at a time, over all devices; a slot whose response ends takes the next one.
  # Fewer slots need less cache; None: all episodes at once, until the longest has ended.
  c.rollout_slots = placeholder(int)
  # Tokens in a row of the episodes that are scored and trained on, packed by the lengths of the
  # responses: quicker where most are shorter than the limits, but for each of a few row counts the
  # step is compiled again. None: one episode a row, by maximum length.
  c.row_length = placeholder(int)
  # Every so many iterations the seconds of rollout, scoring and training are logged apart; only
  # then are the devices waited for in between. None: never.
  c.timing_steps = 10
  # Policy average: decay, counted by 'update' or 'step' (iteration).
  c.ema_decay = 0.992
  c.ema_unit = 'update'
  # Stop when an iteration's KL passes this, nats a response; None: never.
  c.stop_kl = placeholder(float)
  # The released checkpoint: the last one whose validation KL is at most this, nats a response.
  c.max_kl = 2.0
  c.watch = watch()
  # Which weights are validated against max_kl and released: 'raw' or 'ema'.
  c.release = 'raw'
  c.valid_prompts = 256
  # The language stage whose held-out text validates the tax.
  c.text_stage = 'pretrain'
  c.policy_optimizer = optimizer(1e-5, shape='constant')
  c.policy_optimizer.schedule.warmup_steps = 10
  c.value_optimizer = optimizer(1e-5, shape='constant')
  return c


def dpo(*, init: str, ref: str, rankings: str, batch_size: int, row_length: int, peak: float):
  """A policy trained on rankings directly (Rafailov et al. 2023), without a reward model."""
  c = _training('dpo')
  # Where the policy starts, and the reference of its implicit rewards.
  c.init = init
  c.ref = ref
  # Where the rankings come from: a `collect` stage, or 'data' for the recipe's own files.
  c.rankings = rankings
  # Prompts (not pairs, not responses) in a batch; tokens in a packed row.
  c.batch_size = batch_size
  c.row_length = row_length
  c.train_epochs = 1.0
  c.train_steps = placeholder(int)
  # Implicit reward of a response = beta x (its log-prob minus the reference's), in rewards a nat.
  c.beta = 0.1
  # Share of the labels taken to be wrong, in [0, 0.5).
  c.label_smoothing = 0.0
  # As for the reward model.
  c.pair_divisor = 'kept'
  # The reference's log-probs: 'online' runs it in every step, 'precomputed' once over all
  # rankings, after which it needs no memory.
  c.ref_logprobs = 'online'
  c.dropout = 0.0
  c.valid_examples = 512
  c.optimizer = optimizer(peak)
  return c


def evaluate(*, prompts: int) -> ConfigDict:
  """Win rates, KL, tax and samples of the models named."""
  c = ConfigDict()
  c.kind = 'evaluate'
  # Names in the report -> (stage, weights): 'params', 'ema', or None for what the stage released.
  c.models = ConfigDict()
  # True leaves out what does not hang on `models`: the baseline's own rows, best-of-n, the
  # demonstrations, the judging of the reward model. For a second evaluation in a run.
  c.models_only = False
  # ppo stages whose (KL, tax) is traced over their checkpoints.
  c.traces = ()
  # The language stage whose row length and text serve as the held-out documents.
  c.text_stage = 'pretrain'
  # Prompts shown with every model's answer.
  c.shown_samples = 60
  c.baseline = 'sft'
  # Stages for what the models are compared with.
  c.baseline_stage = 'select'
  c.ref = 'rl_init'
  c.reward = 'reward_model'
  # Test prompts, samples of each at temperature 1, held-out pretraining documents.
  c.prompts = prompts
  c.samples = 4
  c.documents = 2000
  # Best-of-n of the baseline by the same reward model.
  c.best_of = (4, 16)
  c.best_of_prompts = 512
  # Temperatures among which the baseline's own best is chosen, on validation by the reward model.
  c.temperatures = (0.0, 0.3, 0.5, 0.7, 1.0)
  c.batch_size = 512
  c.resamples = 2000
  return c


def prepare() -> ConfigDict:
  """Raw files to sharded ones, by `python -m instructjax.data prepare`."""
  c = ConfigDict()
  # Entries of `source`, read in this order within a kind.
  c.sources = ()
  # Share of the prompts (of the texts, where there are no prompts), as in `real_text`; another
  # salt, another split.
  c.valid_fraction = 0.12
  c.test_fraction = 0.08
  c.salt = 'splits'
  # Rows that say the same as an earlier one in all but id and source: 'drop' or 'keep'.
  c.duplicates = 'drop'
  # Kind -> `prompt_rules`, for every kind with prompts; rows are then split by their users. Empty:
  # no rules, and rows are split by their prompts.
  c.rules = ConfigDict()
  # (pattern of source:category, use case of Table 1) for `use-cases`; the first that fits decides,
  # and a category in the words of Table 1 needs none.
  c.use_cases = ()
  # Bytes of records in the shards that are finished together, all splits of a kind. This is what a
  # stop costs, and a shard of the largest split is about this large.
  c.shard_bytes = 128 * 2**20
  return c


def source(kind: str, path: str) -> ConfigDict:
  """Rows of one place for `prepare`, and how they become records."""
  c = ConfigDict()
  # demonstrations, rankings, comparisons, unpaired, safety, prompts, few_shot or pretrain.
  c.kind = kind
  # A file, a pattern, a directory, or tfds:NAME (`instructjax/data/sources.py`).
  c.path = path
  # How the rows are written: a key of FORMS in `instructjax/data/forms.py`.
  c.form = 'plain'
  # Of a data set that has several; and the format, where the path does not tell.
  c.split = ''
  c.format = ''
  # Our field -> theirs, a text with theirs in braces, or a value for every row
  # (`instructjax/data/field_map.py`).
  c.fields = ConfigDict()
  c.templates = ConfigDict()
  c.constants = ConfigDict()
  return c
