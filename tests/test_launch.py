"""The shell scripts: syntax, the choice of a Python, what CI calls."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted(ROOT.glob('launch/**/*.sh')), ROOT / '.ci' / 'run']
BASH = shutil.which('bash')


def _run(*command, **environment):
  return subprocess.run(
    [*map(str, command)], capture_output=True, text=True, check=False, cwd=ROOT,
    env={'PATH': os.environ['PATH'], 'HOME': os.environ.get('HOME', '/'), **environment})


def _name(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize('script', SCRIPTS, ids=_name)
def test_syntax(script):
  done = _run(BASH, '-n', script)
  assert done.returncode == 0, done.stderr


# The test extra brings it, beside the interpreter that runs the tests.
SHELLCHECK = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}{os.pathsep}'
                          f'{os.environ["PATH"]}')


@pytest.mark.skipif(SHELLCHECK is None, reason='shellcheck is not installed')
@pytest.mark.parametrize('script', SCRIPTS, ids=_name)
def test_shellcheck(script):
  done = _run(SHELLCHECK, '-x', script)
  assert done.returncode == 0, done.stdout


def test_scripts_to_be_run_can_be_and_stop_at_an_error():
  run = [f'launch/{name}.sh' for name in (
    'docker', 'gke', 'local', 'quickstart', 'slow', 'slurm', 'test', 'tpu', 'versions')]
  for name in ('.ci/run', *run):
    assert os.access(ROOT / name, os.X_OK), name
    assert (ROOT / name).read_text().startswith('#!/usr/bin/env bash\n'), name
  for name in run:
    assert 'set -euo pipefail' in (ROOT / name).read_text(), name


def test_ci_runs_the_test_script_and_nothing_else():
  commands = [line for line in (ROOT / '.ci' / 'run').read_text().splitlines()
              if line and not line.startswith('#')]
  assert commands == ['exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch/test.sh"']


def test_quickstart_runs_the_main_job():
  text = (ROOT / 'launch' / 'quickstart.sh').read_text().replace('\\\n', '')
  assert '-m instructjax' in text
  assert '--config=configs/quickstart.py --workdir=runs/quickstart' in ' '.join(text.split())


@pytest.mark.parametrize(('devices', 'kept'), [(1, True), (2, False)])
def test_compiled_programs_are_kept_but_for_simulated_devices(devices, kept, tmp_path):
  """What XLA loads from the cache can hang on several CPU devices."""
  done = _run(
    sys.executable, '-c', 'from instructjax import __main__; __main__._use_compilation_cache();'
    'import jax; print(jax.config.jax_enable_compilation_cache)', JAX_PLATFORMS='cpu',
    XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}', XDG_CACHE_HOME=str(tmp_path))
  assert done.stdout.strip() == str(kept), done.stderr


# --- the environment, with stand-ins for the interpreters ----------------------------------------

# `python -c` answers by the exit status $WORKS; `python -m venv DIR` makes DIR/bin/python of the
# same kind; `python -` (the stamp) prints $STAMP; `python -m pip` logs its arguments.
_FAKE_PYTHON = """#!{bash}
case "$1 $2" in
  "-c "*) exit "${{WORKS:-0}}" ;;
  "--version "*) echo "Python of $0" ;;
  "-m venv")
    for last; do :; done
    mkdir -p "$last/bin"; : >"$last/pyvenv.cfg"; cp "$0" "$last/bin/python" ;;
  "-m pip") echo "pip $*" >>"$LOG"; exit "${{PIP_STATUS:-0}}" ;;
  "- "*) echo "${{STAMP:-one}}" ;;
esac
"""


@pytest.fixture
def bare(tmp_path):
  """A path with the base tools only, and a function that runs bash with the scripts sourced."""
  tools = tmp_path / 'tools'
  tools.mkdir()
  for tool in ('bash', 'cat', 'cp', 'dirname', 'env', 'ls', 'mkdir'):
    (tools / tool).symlink_to(shutil.which(tool))

  def add(name, text=_FAKE_PYTHON):
    path = tools / name
    path.write_text(text.format(bash=BASH))
    path.chmod(0o755)

  def prepare(extra='', **environment):
    environment = {'PATH': str(tools), 'LOG': str(tmp_path / 'log'),
                   'INSTRUCTJAX_VENV': str(tmp_path / 'venv')} | environment
    command = f'set -euo pipefail; source launch/environment.sh; prepare_environment {extra}'
    return _run(BASH, '-c', command, **environment)

  prepare.add, prepare.path = add, tmp_path
  prepare.log = lambda: (tmp_path / 'log').read_text().splitlines()
  return prepare


def test_no_python_is_a_friendly_error(bare):
  for environment in ({}, {'PYTHON': '/nowhere/python'}):
    done = bare(**environment)
    assert done.returncode == 1
    assert 'Python' in done.stderr and 'PYTHON' in done.stderr
    assert 'Traceback' not in done.stderr and not (bare.path / 'venv').exists()


def test_a_launcher_that_only_fails_is_passed_over(bare):
  bare.add('python3.13', '#!{bash}\necho "python3.13: command not found" >&2\nexit 127\n')
  bare.add('python3.11')
  done = bare()
  assert done.returncode == 0, done.stderr
  assert 'tools/python3.11' in done.stdout and 'not found' not in done.stderr


def test_the_newest_comes_first_and_PYTHON_before_it(bare):
  for name in ('python3.11', 'python3.13', 'mine'):
    bare.add(name)
  assert 'tools/python3.13' in bare().stdout
  shutil.rmtree(bare.path / 'venv')
  assert 'tools/mine' in bare(PYTHON='mine').stdout


def test_an_environment_is_reused_until_its_stamp_changes(bare):
  bare.add('python3.12')
  assert bare('test').returncode == 0
  assert len(bare.log()) == 1 and bare.log()[0].endswith(f'--editable {ROOT}[test]')
  assert bare('test').stdout == ''
  assert bare().stdout == ''  # the extra has brought the plain installation with it
  assert len(bare.log()) == 1
  assert bare('test', STAMP='two').returncode == 0
  assert len(bare.log()) == 2


def test_a_failed_installation_is_tried_again(bare):
  bare.add('python3.12')
  done = bare(PIP_STATUS='1')
  assert done.returncode == 1 and 'installation failed' in done.stderr
  assert bare().returncode == 0
  assert len(bare.log()) == 2


def test_a_directory_that_is_no_environment_is_left_alone(bare):
  bare.add('python3.12')
  (bare.path / 'home').mkdir()
  (bare.path / 'home' / 'thesis.tex').write_text('')
  done = bare(INSTRUCTJAX_VENV=str(bare.path / 'home'))
  assert done.returncode == 1 and 'is no virtual environment' in done.stderr
  assert os.listdir(bare.path / 'home') == ['thesis.tex']


def test_memory_is_kept_and_settings_of_ones_own_stand(bare):
  def tunables(**environment):
    command = 'source launch/environment.sh; keep_memory; env'
    done = _run(BASH, '-c', command, PATH=str(bare.path / 'tools'), **environment)
    return dict(x.split('=', 1) for x in done.stdout.splitlines() if '=' in x)['GLIBC_TUNABLES']

  assert 'glibc.malloc.trim_threshold=' in tunables()
  assert tunables(GLIBC_TUNABLES='glibc.malloc.check=1') == 'glibc.malloc.check=1'


def test_a_python_that_has_all_is_used_as_it_is(bare):
  bare.add('mine')
  done = bare(INSTRUCTJAX_PYTHON='mine')
  assert done.returncode == 0 and done.stdout == '', done.stderr
  assert not (bare.path / 'venv').exists() and not (bare.path / 'log').exists()
  done = bare(INSTRUCTJAX_PYTHON='mine', WORKS='1')
  assert done.returncode == 1 and 'lacks what instructjax needs' in done.stderr
