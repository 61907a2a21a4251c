"""The language of a text, by py3langid (extra `languages`): the paper's langid.py, kept up.

Its model is in the package: nothing is fetched.
"""

from collections.abc import Callable

# A language as in ISO 639 ('en'), or None where that is not sure.
Detect = Callable[[str], str | None]


def make_detect(min_confidence: float) -> Detect:
  """A detector that is silent below `min_confidence`, a probability: short texts, code, sums.

  Raises:
    ValueError: `min_confidence` is not in [0, 1].
    ImportError: py3langid is not installed.
  """
  if not 0 <= min_confidence <= 1:
    raise ValueError(f'min_confidence is {min_confidence}; it must be from 0 to 1')
  try:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
  except ImportError as error:
    raise ImportError("languages need py3langid: pip install 'instructjax[languages]'") from error
  identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

  def detect(text: str) -> str | None:
    language, probability = identifier.classify(text)
    return language if probability >= min_confidence else None

  return detect
