"""The GPT-3-family transformer in float64 numpy, written from the papers, one sequence at a time.

Brown et al. 2020, section 2.1: GPT-2's architecture. Radford et al. 2019, section 2.3: layer
normalisation before each sub-block and after the last one, learned positions. Radford et al. 2018:
GELU (its tanh form, as in their code), unembedding tied to the token table. Layer normalisation
adds 1e-5 to the variance, attention divides by sqrt(head width).
"""

import numpy as np


def as_float64(tree):
  """A tree of dicts with float64 numpy leaves."""
  if isinstance(tree, dict):
    return {name: as_float64(leaf) for name, leaf in tree.items()}
  return np.asarray(tree, np.float64)


def layer_norm(p, x):
  centred = x - x.mean(-1, keepdims=True)
  variance = (centred**2).mean(-1, keepdims=True)
  return centred / np.sqrt(variance + 1e-5) * p['scale'] + p['bias']


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def log_softmax(x):
  shifted = x - x.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def attention(p, x):
  """Causal self-attention of [T, D], head by head."""
  kernel, bias = p['qkv']['kernel'], p['qkv']['bias']
  _, _, heads, size = kernel.shape
  future = np.triu(np.full((len(x), len(x)), -np.inf), 1)
  out = np.array(np.broadcast_to(p['out']['bias'], x.shape))
  for h in range(heads):
    q, k, v = (x @ kernel[:, i, h] + bias[i, h] for i in range(3))
    weights = softmax(q @ k.T / np.sqrt(size) + future)
    out += weights @ v @ p['out']['kernel'][h]
  return out


def mlp(p, x):
  up = gelu(x @ p['up']['kernel'] + p['up']['bias'])
  return up @ p['down']['kernel'] + p['down']['bias']


def hidden(params, tokens):
  """[T, D] states after the last norm, of plain tokens at positions 0, 1, ..."""
  params = as_float64(params)
  tokens = np.asarray(tokens)
  x = params['token'][tokens] + params['position'][:len(tokens)]

  def pick(tree, l):
    return {n: pick(t, l) if isinstance(t, dict) else t[l] for n, t in tree.items()}

  for l in range(params['blocks']['qkv']['kernel'].shape[0]):
    block = pick(params['blocks'], l)
    x = x + attention(block, layer_norm(block['attention_norm'], x))
    x = x + mlp(block, layer_norm(block['mlp_norm'], x))
  return layer_norm(params['norm'], x)


def logits(params, tokens, vocab_size):
  """[T, V] logits for the token after each of `tokens`."""
  return hidden(params, tokens) @ as_float64(params)['token'][:vocab_size].T


def response_logprobs(params, prompt, response, vocab_size):
  """[R] log-probs of a response's tokens after its prompt."""
  whole = np.concatenate([prompt, response])
  table = log_softmax(logits(params, whole[:-1], vocab_size))
  return table[np.arange(len(prompt) - 1, len(whole) - 1), response]


def response_values(params, prompt, response):
  """[R] a scalar model's number before each response token is chosen."""
  return scalars(params, np.concatenate([prompt, response]))[len(prompt) - 1:-1]


def response_score(params, prompt, response):
  """A scalar model's number at the response's last token."""
  return scalars(params, np.concatenate([prompt, response]))[-1]


def scalars(params, tokens):
  head = as_float64(params['head'])
  return hidden(params, tokens) @ head['kernel'] + head['bias']


def visible(group, branch):
  """[T, T]: token i sees token j iff same group, j <= i, and j in the trunk or in i's branch."""
  size = len(group)
  return np.array([[
    group[i] == group[j] and j <= i and branch[j] in (0, branch[i]) for j in range(size)]
    for i in range(size)])
