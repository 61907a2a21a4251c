"""Model sizes (floor 2).

The named sizes are those of Brown et al. 2020, table 2.1 ("GPT-3 Small" .. "GPT-3 175B"); the
paper's 6B is 6.7B there. Head widths follow from width / heads: in the table 13B lists width 5140
with 40 heads of 128, which does not multiply out, so 5120 is used, as others do.
"""

from instructjax.models.transformer import ModelConfig

# name: (layers, width, heads, initial standard deviation)
SIZES = {
  'micro': (1, 32, 2, 0.1),
  'tiny': (2, 64, 2, 0.08),
  'mini': (4, 128, 4, 0.06),
  'small': (4, 256, 8, 0.04),
  '125m': (12, 768, 12, 0.02),
  '350m': (24, 1024, 16, 0.02),
  '760m': (24, 1536, 16, 0.02),
  '1.3b': (24, 2048, 16, 0.02),
  '2.7b': (32, 2560, 32, 0.02),
  '6.7b': (32, 4096, 32, 0.02),
  '13b': (40, 5120, 40, 0.02),
  '175b': (96, 12288, 96, 0.02),
}


def round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple


def make_model_config(config, *, vocab_size: int) -> ModelConfig:
  """A ModelConfig from a config with the fields of `configs/models.py`.

  Raises:
    ValueError: unknown size, or sizes that do not fit together.
  """
  if config.size not in SIZES:
    raise ValueError(f'model size {config.size!r} is none of {", ".join(SIZES)}')
  layers, width, heads, std = SIZES[config.size]
  layers = config.layers if config.layers is not None else layers
  width = config.width if config.width is not None else width
  heads = config.heads if config.heads is not None else heads
  return ModelConfig(
    vocab_size=vocab_size,
    padded_vocab_size=round_up(vocab_size, config.vocab_multiple),
    context=config.context,
    layers=layers,
    width=width,
    heads=heads,
    mlp_width=4 * width,
    dropout=config.dropout,
    compute_dtype=config.compute_dtype,
    remat=config.remat,
    init_std=config.init_std if config.init_std is not None else std,
    attention=config.attention,
    logits_mib=config.logits_mib,
  )
