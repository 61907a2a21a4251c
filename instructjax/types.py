"""The records that flow through the system (floor 0).

A batch is prompts with responses, laid out in packed rows. Every array of a batch starts with a
microbatch axis m: the train step scans over it, and each slice is complete in itself (its indexes
point into its own rows). Batch sizes count prompts, episodes or documents; how many rows they fill
is the loader's matter.

Dimension letters: m microbatches, N rows, T tokens in a row, M selected slots in a row, n
responses, R tokens in a response, G groups (prompts), K responses of a prompt, P tokens in a
prompt.
"""

import dataclasses
from typing import Any

import jax

Array = Any  # jax.Array on the device, numpy.ndarray in the loader


def record(cls):
  """Makes `cls` a frozen dataclass that JAX treats as a tree of its fields."""
  cls = dataclasses.dataclass(frozen=True)(cls)
  names = [f.name for f in dataclasses.fields(cls)]
  jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])
  return cls


@record
class Rows:
  """Packed rows: the one input type of every model.

  Groups lie in a row as a trunk (the prompt) followed by branches (the responses). Token i sees
  token j iff both are of one group, j <= i, and j is in the trunk or in i's branch.
  """

  tokens: Array    # [m, N, T] int32 token ids
  group: Array     # [m, N, T] int32; 0 = padding, else 1 + the item's index in the global batch
  branch: Array    # [m, N, T] int32; 0 = trunk, 1.. = the response's number within its group
  position: Array  # [m, N, T] int32; a branch's positions continue from its trunk's length
  parent: Array    # [m, N, T] int32 row index of the predecessor; -1 at a group's start and padding


@record
class Gather:
  """Static-shape indexes from rows to responses.

  A head runs only at the `select`ed tokens of each row; `index` then brings the per-slot scalars
  into the [n, R] layout that losses and RL maths see.
  """

  select: Array  # [m, N, M] int32 row positions of the tokens that a head is needed for
  index: Array   # [m, n, R] int32 flat index into the N*M slots of the same microbatch
  mask: Array    # [m, n, R] bool, True where the response has this token


@record
class LanguageBatch:
  """Documents or demonstrations, with the weight that each selected token has in the loss."""

  rows: Rows
  select: Array  # [m, N, M] int32 row positions of the tokens to predict
  weight: Array  # [m, N, M] float32; 0 = no loss, 1 = per-token mean, 1/length = per-response mean


@record
class RankingBatch:
  """Prompts with K ranked responses each; prompts with fewer have empty slots.

  Response (g, k) is entry g*K + k of `gather`, whose only token (R = 1) is the response's last.
  """

  rows: Rows
  gather: Gather        # index, mask [m, G*K, 1]
  better: Array         # [m, G, K, K] float32 weight of the label "i preferred to j"; 0 = none, tie
  margin: Array         # [m, G, K, K] float32 margin of that label, in score units
  prompt_weight: Array  # [m, G] float32 weight of the prompt's labels beside other prompts'
  response_mask: Array  # [m, G, K] bool, True where the slot holds a response
  length: Array         # [m, G, K] int32 response tokens, end-of-text included


@record
class PreferenceBatch:
  """Prompts with K ranked responses each, every response token selected: DPO and its kin.

  Response (g, k) is entry g*K + k of `gather`.
  """

  rows: Rows
  gather: Gather        # index, mask [m, G*K, R]
  better: Array         # [m, G, K, K] float32 weight of the label "i preferred to j"; 0 = none, tie
  prompt_weight: Array  # [m, G] float32 weight of the prompt's labels beside other prompts'
  response_mask: Array  # [m, G, K] bool, True where the slot holds a response
  ref_logprobs: Array | None  # [m, G, K] float32 sums under the reference; None: computed each step


@record
class Prompts:
  """Prompts to answer, one a row and left-aligned (no microbatch axis)."""

  tokens: Array  # [n, P] int32, begin-of-text first
  length: Array  # [n] int32, at least 1
  item: Array    # [n] int32 identity within the step's global batch; keys are folded from it


@record
class Samples:
  """What generation returns (no microbatch axis). End-of-text is a token of the response."""

  tokens: Array    # [n, R] int32, padding after the end
  mask: Array      # [n, R] bool, True up to and including end-of-text
  logprobs: Array  # [n, R] float32 log-probability under the sampling distribution
  ended: Array     # [n] bool, True if end-of-text (or a stop token) was sampled within R tokens


@record
class Experience:
  """Episodes of an iteration, scored; [u, m, ...] with u minibatches of m microbatches.

  Every [n, R] array is aligned to response tokens: `values[:, t]` is the estimate before token t
  is chosen, `logprobs[:, t]` belongs to token t.
  """

  rows: Rows
  gather: Gather         # index, mask [u, m, n, R]
  old_logprobs: Array    # [u, m, n, R] float32, by the training forward of the behaviour policy
  ref_logprobs: Array    # [u, m, n, R] float32
  old_values: Array      # [u, m, n, R] float32
  scores: Array          # [u, m, n] float32, after bias, scale and clip
  ended: Array           # [u, m, n] bool
