"""Presidio's recognizers that need neither a model nor the network; the extra `pii` has them.

Its own engine downloads a language model to find names and places. The recognizers here are those
of patterns, checks and, for telephones, numbering plans, called one by one.
"""

import functools

from instructjax.data.pii import Finder

# Its entities in the words of `pii.KINDS`.
_KINDS = {
  'EMAIL_ADDRESS': 'email', 'PHONE_NUMBER': 'phone', 'CREDIT_CARD': 'card', 'IBAN_CODE': 'iban',
  'US_SSN': 'national id', 'US_ITIN': 'national id', 'UK_NINO': 'national id', 'IP_ADDRESS': 'ip',
  'MAC_ADDRESS': 'mac'}
# From here on; below are guesses that Presidio wants a word beside, as nine digits for an SSN.
# A telephone number that is valid in a numbering plan has 0.4.
_SCORE = 0.4


@functools.cache
def make_finder() -> Finder:
  """Kinds of personal data that Presidio's recognizers find in a text.

  Raises:
    ImportError: it is not installed.
  """
  try:
    import tldextract
    from presidio_analyzer import predefined_recognizers as of
  except ImportError as error:
    raise ImportError(
      "the finder 'presidio' needs presidio-analyzer: pip install 'instructjax[pii]'") from error
  suffixes = tldextract.TLDExtract(suffix_list_urls=())  # the list that comes with it

  class Email(of.EmailRecognizer):
    """Asks the list of public suffixes that is installed; its own fetches one."""

    def validate_result(self, pattern_text: str) -> bool:
      return bool(suffixes(pattern_text).top_domain_under_public_suffix)

  recognizers = (
    Email(), of.PhoneRecognizer(), of.CreditCardRecognizer(), of.IbanRecognizer(),
    of.UsSsnRecognizer(), of.UsItinRecognizer(), of.UkNinoRecognizer(), of.IpRecognizer(),
    of.MacAddressRecognizer())

  def find(text: str) -> set[str]:
    return {_KINDS[found.entity_type] for recognizer in recognizers
            for found in recognizer.analyze(text, recognizer.supported_entities, None)
            if found.score >= _SCORE}

  return find
