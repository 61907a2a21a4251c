"""Long-form rows of the report (floor 8)."""

from instructjax.evaluators import statistics


def row(metric: str, model: str | None, value, **more) -> dict:
  """One long-form row; an Interval gives value, low, high and n."""
  if isinstance(value, statistics.Interval):
    more = {'low': value.low, 'high': value.high, 'n': value.n, **more}
    value = value.value
  return {'metric': metric, 'model': model, 'value': value, **more}
