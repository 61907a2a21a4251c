"""Progress lines and tables."""

import io

from rich.console import Console

from instructjax import display


def _console(terminal=False):
  return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)


class _Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_without_a_terminal_a_line_comes_now_and_then_and_one_at_the_end():
  console, clock = _console(), _Clock()
  with display.Progress('sft', 100, 20, console=console, clock=clock) as progress:
    for step in range(21, 101):
      clock.now += 1.0
      progress.update(step, tokens=500, metrics={'language/loss': 2.0 / step, 'b': 1})
    assert progress.tokens_per_second == 500
  lines = console.file.getvalue().splitlines()
  assert len(lines) == 3  # after 30 and 60 of the 80 seconds, and at the end
  assert lines[0] == 'sft  50/100  500 tokens/s  ETA 0:50  language/loss 0.04  b 1'
  assert lines[-1] == 'sft  100/100  500 tokens/s  1:20  language/loss 0.02  b 1'


def test_on_a_terminal_there_is_a_bar():
  console = _console(terminal=True)
  with display.Progress('ppo', 4, 0, console=console) as progress:
    progress.update(4, tokens=10, metrics={f'm{i}': i for i in range(6)})
    progress.print('a line above')
  text = console.file.getvalue()
  assert 'ppo' in text and '4/4' in text and 'a line above' in text
  assert 'm3 3' in text and 'm4' not in text  # four metrics at most


def test_a_resumed_stage_that_is_complete_shows_no_rate():
  console = _console()
  with display.Progress('sft', 0, 0, console=console):
    pass
  assert console.file.getvalue().startswith('sft  0/0')


def test_stage_table():
  console = _console()
  display.stage_table('sft', {'steps': 10, 'loss': 0.123456, 'ok': True, 'gold': None},
                      console=console)
  text = console.file.getvalue()
  assert '0.1235' in text and 'yes' in text and ' - ' in text


def test_sample_table_keeps_brackets_and_says_what_it_cut():
  console = _console()
  display.sample_table(
    [{'prompt': 'Say [bold]hi[/bold] \\', 'response': 'x' * 500}, {'prompt': 'q', 'gold': 3}],
    max_characters=50, console=console)
  text = console.file.getvalue()
  assert '[bold]hi[/bold] \\' in text and 'x' * 49 + '…' in text and 'gold' in text


def test_many_samples_stand_below_each_other():
  console = _console()
  models = {f'model {i}': f'answer {i} of some words' for i in range(12)}
  display.sample_table([{'prompt': 'one', **models}, {'prompt': 'two', **models}], console=console)
  lines = console.file.getvalue().splitlines()
  for i in range(12):
    assert sum(f'model {i} ' in line and f'answer {i} of some words' in line for line in lines) == 2
