"""Held-out language-model loss, document by document (floor 6)."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import scoring, sharding
from instructjax.data.pipeline import LanguageLoader
from instructjax.models.transformer import ModelConfig


class DocumentLosses(NamedTuple):
  """Summed weighted loss (nats) and weight of each document, so that runs can be paired."""

  total: np.ndarray   # [n] float64
  weight: np.ndarray  # [n] float64

  def mean(self) -> float:
    """Mean loss per weighted token, nats."""
    return float(self.total.sum() / self.weight.sum())


class LikelihoodEvaluator:
  """Loss of policies of one architecture on a fixed set.

  Args:
    mesh, model: as usual.
    loader: over the set, in `Sequential` order; batches are built once and kept.
  """

  def __init__(self, mesh: Mesh, model: ModelConfig, loader: LanguageLoader):
    self._batches = []
    for step in range(loader.steps()):
      batch = loader.batch(step)
      group = np.take_along_axis(batch.rows.group, batch.select, axis=-1)
      self._batches.append(
        (loader.indices(step), group, batch.weight, sharding.put_batch(mesh, batch, axis=1)))
    self._size = sum(len(indices) for indices, *_ in self._batches)

    def losses(params, batch):
      return jax.lax.map(
        lambda b: -scoring.token_scores(
          model, params, b.rows, b.select, entropy=False).logprobs, batch)

    self._losses = jax.jit(
      sharding.on_mesh(mesh, losses), out_shardings=sharding.batch_sharding(mesh, 1))

  def run(self, params) -> DocumentLosses:
    """Losses of all documents, in the loader's order."""
    total, weights = np.zeros(self._size), np.zeros(self._size)
    for indices, group, weight, batch in self._batches:
      losses = np.asarray(sharding.fetch(self._losses(params, batch)), np.float64)
      counted = weight > 0
      items = indices[group[counted] - 1]
      np.add.at(total, items, losses[counted] * weight[counted])
      np.add.at(weights, items, weight[counted].astype(np.float64))
    return DocumentLosses(total, weights)
