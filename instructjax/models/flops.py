"""Model FLOPs: the matrix products that a step asks for, whatever is done besides (floor 2).

Two FLOPs a multiply-add. Attention counts the keys that a query sees; a prompt with several
responses counts once; the head counts the positions whose logits are needed. A backward pass is
twice its forward. Norms, softmax, the optimizer, padding and what a backward pass recomputes count
nothing, so rates of different programs, packings and remat policies can be compared.

Letters: L layers, D width, F feed-forward width, V vocabulary.
"""

import dataclasses

import jax
import numpy as np

from instructjax.models.transformer import ModelConfig
from instructjax.types import Prompts, Rows

# Dense bfloat16 matrix products of one device as JAX counts them, FLOP/s, by the start of JAX's
# name of it; from the vendors' data sheets.
PEAKS = {
  'TPU v2': 22.5e12,  # a core; a chip has two
  'TPU v3': 61.5e12,  # a core; a chip has two
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100 NVL': 835e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
}


@dataclasses.dataclass(frozen=True)
class Work:
  """What passes through a network.

  Attributes:
    sequences: groups: documents, prompts.
    tokens: positions.
    pairs: (query, key) pairs of positions that see each other.
    logits: positions whose next token is predicted.
  """

  sequences: float = 0.0
  tokens: float = 0.0
  pairs: float = 0.0
  logits: float = 0.0

  def __add__(self, other: 'Work') -> 'Work':
    return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def times(self, factor: float) -> 'Work':
    """All of it so often."""
    return Work(*(factor * a for a in dataclasses.astuple(self)))


def trunk_flops(layers: int, width: int, mlp_width: int, tokens: float, pairs: float) -> float:
  """A forward pass through the layers: 2 L (4 D^2 + 2 D F) a position, 4 L D a visible pair."""
  return layers * (tokens * (8 * width**2 + 4 * width * mlp_width) + 4 * width * pairs)


def head_flops(width: int, vocab: int, positions: float) -> float:
  """Logits: 2 D V a position."""
  return 2 * width * vocab * positions


def forward(model: ModelConfig, work: Work, *, logits: bool = True) -> float:
  """FLOPs of one forward pass, with the logits that `work` asks for (a policy) or without any."""
  trunk = trunk_flops(model.layers, model.width, model.mlp_width, work.tokens, work.pairs)
  return trunk + head_flops(model.width, model.vocab_size, work.logits if logits else 0.0)


def work_of(stream) -> Work:
  """Counts one stream of a batch, numpy arrays on the host.

  Packed rows: a position sees as many keys as come before it in its trunk and branch, and itself.
  Logits are those of a `weight` above 0 or of the response tokens in `gather`.
  """
  if isinstance(stream, Prompts):
    length = np.asarray(stream.length, np.float64)
    return Work(length.size, length.sum(), (length * (length + 1) / 2).sum())
  rows: Rows = stream.rows
  real = rows.group > 0
  # Rankings have a weight too, that of their labels.
  predicted = stream.gather.mask if hasattr(stream, 'gather') else stream.weight
  return Work(
    float(np.count_nonzero(real & (rows.parent < 0))), float(np.count_nonzero(real)),
    float((rows.position[real].astype(np.float64) + 1).sum()), float(np.count_nonzero(predicted)))


def episodes(prompts: Work, response_tokens: float) -> Work:
  """Prompts with a response each, of `response_tokens` in all.

  Every response is taken to have the mean length and the mean prompt, which leaves out the (small)
  term of how unequal they are.
  """
  n = max(prompts.sequences, 1.0)
  prompt, response = prompts.tokens / n, response_tokens / n
  between = n * (prompt * response + response * (response + 1) / 2)
  return Work(
    prompts.sequences, prompts.tokens + response_tokens, prompts.pairs + between, response_tokens)


def device_peak(device: jax.Device) -> float | None:
  """Its peak by the data sheet, FLOP/s, or None where it is not known (any CPU)."""
  return peak_of(device.device_kind)


def peak_of(kind: str) -> float | None:
  """`device_peak` by JAX's name of the device."""
  for name in sorted(PEAKS, key=len, reverse=True):
    if kind.startswith(name):
      return PEAKS[name]
  return None
