"""The scripts that start jobs elsewhere: what they would do, with stand-ins for the tools."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / 'tests' / 'golden' / 'jobset_schema.json').read_text())
JOB = ('--config=configs/quickstart.py:test', '--workdir=/runs/mine')
TPU = {'PROJECT': 'p', 'ZONE': 'z', 'TPU_NAME': 'pod', 'ACCELERATOR_TYPE': 'v5p-16',
       'RUNTIME_VERSION': 'v2'}
GKE = {'NAME': 'mine', 'IMAGE': 'here/instructjax:1', 'HOSTS': '4', 'CLAIM': 'runs'}


class Machine:
  """Runs scripts with stand-ins for the tools, which log their words and act as a file says."""

  def __init__(self, tmp_path):
    self._bin, self._log = tmp_path / 'bin', tmp_path / 'log'
    self._bin.mkdir()
    self._log.touch()

  def add(self, tool, body=''):
    path = self._bin / tool
    path.write_text(f'#!/bin/bash\necho "{tool} $*" >>{shlex.quote(str(self._log))}\n{body}\n')
    path.chmod(0o755)

  def environment(self, **variables):
    return {'PATH': f'{self._bin}:{os.environ["PATH"]}', 'HOME': os.environ.get('HOME', '/'),
            'INSTRUCTJAX_PYTHON': sys.executable, 'WAIT_SECONDS': '0', **variables}

  def run(self, script, *words, **variables):
    return subprocess.run(
      ['bash', str(ROOT / 'launch' / script), *words], capture_output=True, text=True,
      check=False, cwd=ROOT, env=self.environment(**variables), timeout=60)

  def log(self):
    return self._log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def words(line):
  return shlex.split(line)


@pytest.mark.parametrize(('script', 'first', 'variables'), [
  ('local.sh', ('--processes', '2', '--dry_run', *JOB), {}),
  ('slurm.sh', ('--dry_run', *JOB), {}), ('tpu.sh', ('all', '--dry_run', *JOB), TPU),
  ('gke.sh', ('submit', '--dry_run', *JOB), GKE),
  ('docker.sh', ('build', '--dry_run'), {'IMAGE': 'a', 'BASE_IMAGE': 'b'})])
def test_a_dry_run_shows_all_and_does_nothing(script, first, variables, machine):
  tools = ('srun', 'sbatch', 'scancel', 'scontrol', 'gcloud', 'kubectl', 'docker', 'git')
  for tool in tools:
    machine.add(tool)
  done = machine.run(script, *first, **variables)
  assert done.returncode == 0, done.stderr
  assert machine.log() == []
  assert any(tool in done.stdout for tool in ('instructjax', *tools))


@pytest.mark.parametrize(('script', 'first', 'variables', 'missing'), [
  ('tpu.sh', ('create',), TPU, 'PROJECT'), ('tpu.sh', ('create',), TPU, 'RUNTIME_VERSION'),
  ('gke.sh', ('print', *JOB), GKE, 'IMAGE'), ('gke.sh', ('print', *JOB), GKE, 'CLAIM'),
  ('gke.sh', ('print', *JOB), {**GKE, 'TPU_ACCELERATOR': 'a', 'TPU_TOPOLOGY': '2x2x4'},
   'TPU_TOPOLOGY'),
  ('docker.sh', ('build',), {'IMAGE': 'a', 'BASE_IMAGE': 'b'}, 'IMAGE'),
  ('docker.sh', ('build',), {'IMAGE': 'a', 'BASE_IMAGE': 'b'}, 'BASE_IMAGE')])
def test_a_variable_that_is_not_set_is_named(script, first, variables, missing, machine):
  given = {name: value for name, value in variables.items() if name != missing}
  done = machine.run(script, first[0], '--dry_run', *first[1:], **given)
  assert done.returncode == 1
  assert f'{missing} is not set: ' in done.stderr and f'{missing}=' in done.stderr


@pytest.mark.parametrize(('script', 'first', 'variables'), [
  ('local.sh', (), {}), ('slurm.sh', (), {}), ('tpu.sh', ('run',), TPU),
  ('gke.sh', ('print',), GKE)])
def test_flags_of_the_recipe_are_asked_for(script, first, variables, machine):
  for flag in JOB:
    done = machine.run(script, *first, '--dry_run', flag, **variables)
    assert done.returncode == 1
    assert 'is missing: give the flags' in done.stderr, done.stderr


def test_no_name_of_a_registry_or_project_is_built_in():
  for path in [*(ROOT / 'launch').iterdir(), ROOT / '.dockerignore']:
    text = path.read_text()
    for host in ('docker.io', 'gcr.io', 'pkg.dev', 'quay.io', 'ghcr.io', 'nvcr.io'):
      assert host not in text, f'{path.name} names {host}'


# --- SLURM ---------------------------------------------------------------------------------------


SLURM = {'SLURM_JOB_ID': '7', 'SLURM_SUBMIT_DIR': str(ROOT)}


def test_slurm_starts_one_step_that_ends_together(machine):
  machine.add('srun')
  done = machine.run('slurm.sh', *JOB, **SLURM)
  assert done.returncode == 0, done.stderr
  (line,) = machine.log()
  assert words(line)[:5] == ['srun', '--kill-on-bad-exit=1', sys.executable, '-m', 'instructjax']
  assert {'--distributed', '--preflight=first', *JOB} <= set(words(line))


def test_slurm_passes_on_how_the_run_ended(machine):
  machine.add('srun', 'exit 3')
  machine.add('scontrol')
  assert machine.run('slurm.sh', *JOB, **SLURM).returncode == 3
  assert not any('requeue' in line for line in machine.log())


def test_slurm_refuses_tasks_that_leave_gpus_idle(machine):
  machine.add('srun')
  given = {**SLURM, 'SLURM_GPUS_ON_NODE': '8', 'SLURM_NTASKS_PER_NODE': '1'}
  done = machine.run('slurm.sh', *JOB, **given)
  assert done.returncode == 1 and '--ntasks-per-node=8' in done.stderr
  assert machine.run('slurm.sh', *JOB, **{**given, 'SLURM_NTASKS_PER_NODE': '8'}).returncode == 0


@pytest.mark.parametrize(('ending', 'queued'), [
  ('exit 0', True), ('exit 3', False), ('exec sleep 20', True)])
def test_slurm_saves_before_the_limit_and_is_queued_again(ending, queued, machine, tmp_path):
  """The step ends once `scancel` has signalled it, or not in time; the script has the signal."""
  ready, stopped = tmp_path / 'ready', tmp_path / 'stopped'
  machine.add('srun', f'touch {ready}; while [[ ! -e {stopped} ]]; do sleep 0.05; done; {ending}')
  machine.add('scancel', f'touch {stopped}')
  machine.add('scontrol')
  process = subprocess.Popen(
    ['bash', str(ROOT / 'launch' / 'slurm.sh'), *JOB], env=machine.environment(
      **SLURM, SAVE_SECONDS='2'), stdout=subprocess.PIPE, text=True)
  until = time.monotonic() + 30
  while not ready.exists() and time.monotonic() < until:
    time.sleep(0.05)
  process.send_signal(signal.SIGUSR1)
  code = process.wait(timeout=30)
  assert machine.log()[1:] == [
    'scancel --signal=TERM 7.0', *['scontrol requeue 7'] * queued]
  assert code == (0 if queued else 3)
  assert ('queued again' in process.stdout.readline() + process.stdout.readline()) == queued


# --- TPU -----------------------------------------------------------------------------------------


def gcloud(tmp_path, *, states, attempts):
  """A stand-in whose pod goes through `states`, and whose runs end with `attempts`."""
  for name, values in (('states', states), ('attempts', attempts)):
    (tmp_path / name).write_text('\n'.join(values) + '\n')
  take = (f'next() {{ local f={tmp_path}/$1 v; v="$(head -n1 "$f")"; '
          '[[ "$(wc -l <"$f")" -gt 1 ]] && sed -i 1d "$f"; echo "$v"; }')
  return f"""{take}
case "$*" in
  *"queued-resources describe"*) s="$(next states)"; [[ "$s" == NONE ]] && exit 1; echo "$s" ;;
  *"instructjax --distributed"*) exit "$(next attempts)" ;;
esac"""


def kinds(machine):
  """The log, a word for each call."""
  names = {'queued-resources create': 'create', 'queued-resources delete': 'delete',
           'tpu-vm scp': 'copy', 'prepare_environment tpu': 'install',
           'instructjax --distributed': 'run'}
  found = [next((short for text, short in names.items() if text in line), None)
           for line in machine.log()]
  return [f for f in found if f]


def test_tpu_waits_for_the_pod_then_installs_and_runs(machine, tmp_path):
  machine.add('gcloud', gcloud(
    tmp_path, states=('NONE', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'), attempts='0'))
  done = machine.run('tpu.sh', 'all', *JOB, **TPU, SPOT='1')
  assert done.returncode == 0, done.stderr
  assert kinds(machine) == ['create', 'copy', 'install', 'run']
  create = next(words(line) for line in machine.log() if 'create' in line)
  assert {'--spot', '--project=p', '--zone=z', '--accelerator-type=v5p-16', '--node-id=pod',
          '--runtime-version=v2'} <= set(create)
  run = next(line for line in machine.log() if 'instructjax --distributed' in line)
  assert '--worker=all' in run and 'flock' in run and all(flag in run for flag in JOB)


def test_tpu_makes_a_lost_pod_anew_and_goes_on(machine, tmp_path):
  machine.add('gcloud', gcloud(
    tmp_path, states=('SUSPENDED', 'SUSPENDED', 'SUSPENDED', 'NONE', 'PROVISIONING', 'ACTIVE'),
    attempts=('255', '0')))
  done = machine.run('tpu.sh', 'run', *JOB, **TPU)
  assert done.returncode == 0, done.stderr
  assert kinds(machine) == ['run', 'delete', 'create', 'copy', 'install', 'run']


def test_tpu_only_starts_again_where_the_pod_is_still_there(machine, tmp_path):
  machine.add('gcloud', gcloud(tmp_path, states=('ACTIVE',), attempts=('255', '255', '0')))
  assert machine.run('tpu.sh', 'run', *JOB, **TPU).returncode == 0
  assert kinds(machine) == ['run'] * 3


def test_tpu_gives_up_on_a_run_that_cannot_begin(machine, tmp_path):
  machine.add('gcloud', gcloud(tmp_path, states=('ACTIVE',), attempts=('1',)))
  done = machine.run('tpu.sh', 'run', *JOB, **TPU)
  assert done.returncode == 1 and 'three times in a row' in done.stderr
  assert kinds(machine) == ['run'] * 3
  done = machine.run('tpu.sh', 'run', *JOB, **TPU, QUICK_SECONDS='0', MAX_RESTARTS='4')
  assert done.returncode == 1 and 'failed 5 times' in done.stderr


# --- Kubernetes ----------------------------------------------------------------------------------


PLACES = {'cpu': {}, 'gpu': {'GPUS_PER_HOST': '8'},
          'tpu': {'TPU_ACCELERATOR': 'tpu-v5p-slice', 'TPU_TOPOLOGY': '2x2x4',
                  'TPUS_PER_HOST': '4'}}


def manifest(machine, place, *more):
  done = machine.run('gke.sh', 'print', *JOB, *more, **GKE, **PLACES[place])
  assert done.returncode == 0, done.stderr
  assert more or '${' not in done.stdout
  return yaml.safe_load(done.stdout)


def validate(found):
  """The JobSet by our reduced schema of its CRD, the jobs in it by Kubernetes' own."""
  jsonschema.validate(found, SCHEMA)
  for job in found['spec']['replicatedJobs']:
    kubernetes_validate.validate(
      {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': job['name']},
       **job['template']}, '1.30', strict=True)


@pytest.mark.parametrize('place', PLACES)
def test_the_manifest_is_valid(place, machine):
  found = manifest(machine, place)
  validate(found)
  (job,) = found['spec']['replicatedJobs']
  spec = job['template']['spec']
  assert spec['parallelism'] == spec['completions'] == 4
  (container,) = spec['template']['spec']['containers']
  limits = {'cpu': {}, 'gpu': {'nvidia.com/gpu': 8}, 'tpu': {'google.com/tpu': 4}}[place]
  assert container['resources']['limits'] == limits
  command = container['command']
  assert command[:3] == ['python', '-m', 'instructjax'] and set(JOB) <= set(command)
  if place == 'tpu':
    assert '--distributed' in command
  else:
    assert {'--coordinator=mine-worker-0-0.mine:8476', '--processes=4',
            '--process_id=$(JOB_COMPLETION_INDEX)'} <= set(command)


@pytest.mark.parametrize('fault', [
  lambda m: m['spec'].update(failurePolicies={}),
  lambda m: m['spec']['failurePolicy'].update(maxRestarts='20'),
  lambda m: m['spec']['replicatedJobs'][0]['template']['spec'].update(completion=4),
  lambda m: m['spec']['replicatedJobs'][0]['template']['spec']['template']['spec'].update(
    terminationGracePeriodSeconds='300'),
  lambda m: m['spec']['replicatedJobs'][0]['template']['spec']['template']['spec'][
    'containers'][0].pop('name')])
def test_the_schemas_see_a_fault(fault, machine):
  found = manifest(machine, 'tpu')
  fault(found)
  with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
    validate(found)


def test_flags_come_to_the_program_as_they_were_given(machine):
  odd = '--config.title=a & "b" \\ ${NAME}'
  found = manifest(machine, 'cpu', odd)
  (job,) = found['spec']['replicatedJobs']
  assert job['template']['spec']['template']['spec']['containers'][0]['command'][-1] == odd


def test_a_workdir_outside_of_the_claim_is_refused(machine):
  done = machine.run('gke.sh', 'print', JOB[0], '--workdir=/tmp/mine', **GKE)
  assert done.returncode == 1 and 'is not in /runs' in done.stderr


def test_submit_hands_the_manifest_to_the_cluster(machine, tmp_path):
  machine.add('kubectl', f'cat >{tmp_path}/given')
  assert machine.run('gke.sh', 'submit', *JOB, **GKE).returncode == 0
  assert machine.log() == ['kubectl apply --filename=-']
  validate(yaml.safe_load((tmp_path / 'given').read_text()))


# --- Docker --------------------------------------------------------------------------------------


def test_docker_builds_what_the_file_asks_for(machine):
  machine.add('docker')
  assert machine.run('docker.sh', 'build', IMAGE='a:1', BASE_IMAGE='b', EXTRA='tpu').returncode == 0
  (line,) = machine.log()
  assert {'--build-arg=BASE_IMAGE=b', '--build-arg=EXTRA=tpu', '--tag=a:1'} <= set(words(line))
  text = (ROOT / 'launch' / 'Dockerfile').read_text()
  for argument in ('BASE_IMAGE', 'EXTRA'):
    assert f'\nARG {argument}' in text
  copied = [w for line in text.splitlines() if line.startswith('COPY') for w in line.split()[1:-1]]
  assert copied and all((ROOT / name).exists() for name in copied)
  kept = (ROOT / '.dockerignore').read_text().split()
  assert {f'!{name}' for name in copied} <= set(kept)


def test_docker_wants_an_extra_that_there_is(machine):
  done = machine.run('docker.sh', 'build', IMAGE='a', BASE_IMAGE='b', EXTRA='cuda')
  assert done.returncode == 1 and 'EXTRA=cuda' in done.stderr


# --- several processes here, with a stand-in for Python ------------------------------------------


def python(machine, tmp_path, body):
  """An INSTRUCTJAX_PYTHON whose `-m instructjax` runs `body` with $me the process's number."""
  machine.add('fake-python', f"""case "$1 $2" in
  "-m instructjax") for word; do [[ $word == --process_id=* ]] && me="${{word#*=}}"; done
    {body} ;;
  "-c "*) [[ "$2" == *socket* ]] && echo 4242; exit 0 ;;
esac""")
  return {'INSTRUCTJAX_PYTHON': str(tmp_path / 'bin' / 'fake-python')}


def test_local_starts_all_with_one_coordinator(machine, tmp_path):
  given = python(machine, tmp_path, 'echo "I am $me"')
  done = machine.run('local.sh', '--processes', '3', JOB[0], f'--workdir={tmp_path}/run', **given)
  assert done.returncode == 0, done.stderr
  started = [line for line in machine.log() if 'instructjax' in line]
  assert sorted(words(line)[-1] for line in started) == [f'--process_id={i}' for i in range(3)]
  assert all('--coordinator=127.0.0.1:4242 --processes=3' in line for line in started)
  assert done.stdout == 'I am 0\n'
  assert (tmp_path / 'run' / 'logs' / 'process-2.log').read_text() == 'I am 2\n'


def test_local_ends_the_others_when_one_fails(machine, tmp_path):
  given = python(
    machine, tmp_path, '((me == 1)) && { echo "I broke"; exit 5; }; exec sleep 60')
  began = time.monotonic()
  done = machine.run('local.sh', '--processes', '3', '--grace_seconds', '1', JOB[0],
                     f'--workdir={tmp_path}/run', **given)
  assert done.returncode == 5 and time.monotonic() - began < 20
  assert 'process 1 ended with status 5' in done.stderr and 'I broke' in done.stderr
  assert 'are killed' in done.stderr


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_stop_on_to_all(number, machine, tmp_path):
  given = python(
    machine, tmp_path, f'trap "touch {tmp_path}/saved-$me; exit 0" TERM; touch {tmp_path}/up-$me; '
    'while :; do sleep 0.05; done')
  process = subprocess.Popen(
    ['bash', str(ROOT / 'launch' / 'local.sh'), '--processes', '2', JOB[0],
     f'--workdir={tmp_path}/run'], env=machine.environment(**given), stderr=subprocess.PIPE,
    text=True)
  until = time.monotonic() + 30
  while not all((tmp_path / f'up-{i}').exists() for i in range(2)) and time.monotonic() < until:
    time.sleep(0.05)
  process.send_signal(number)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 0 and 'save and leave' in err
  assert all((tmp_path / f'saved-{i}').exists() for i in range(2))


@pytest.mark.parametrize('wrong', ['0', 'two', ''])
def test_local_wants_a_number_of_processes(wrong, machine):
  done = machine.run('local.sh', '--processes', wrong, *JOB)
  assert done.returncode == 1 and 'whole number from 1 on' in done.stderr


def test_one_process_is_the_plain_command(machine, tmp_path):
  given = python(machine, tmp_path, 'echo plain')
  assert machine.run('local.sh', *JOB, **given).stdout == 'plain\n'
  assert words(machine.log()[-1])[1:] == ['-m', 'instructjax', *JOB]




# --- both ends of the versions, with stand-ins for the interpreters -------------------------------


def end(machine, name, found, status=0):
  """An interpreter on the path that makes environments of its own kind, and says `found`."""
  machine.add(name, f"""case "$1 $2" in
  "-m venv") for last; do :; done
    mkdir -p "$last/bin"; : >"$last/pyvenv.cfg"; cp "$0" "$last/bin/python" ;;
  "-m pip") echo "constraint ${{PIP_CONSTRAINT:-none}}" >>{shlex.quote(str(machine._log))} ;;
  "-m pytest") exit {status} ;;
  "- "*) exec {sys.executable} "$@" ;;
  "-c "*) [[ "$2" != *cpu_count* ]] || echo 1; [[ "$2" != *metadata* ]] || echo "{found}" ;;
esac""")


OLD, NEW = 'Python 3.11.9 with jax 0.10.2', 'Python 3.12.1 with jax 0.11.2'


def versions(machine, tmp_path, *words, **variables):
  return machine.run(
    'versions.sh', *words, INSTRUCTJAX_VERSIONS=str(tmp_path / 'ends'), **variables)


def test_both_ends_of_the_versions_are_tested(machine, tmp_path):
  end(machine, 'python3.11', OLD)
  end(machine, 'python3.12', NEW)
  done = versions(machine, tmp_path, '-k', 'losses')
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-2:] == [f'oldest: passed ({OLD})', f'newest: passed ({NEW})']
  runs = [line for line in machine.log() if '-m pytest' in line]
  assert len(runs) == 2 and all(words(line)[-2:] == ['-k', 'losses'] for line in runs)
  constraints = tmp_path / 'ends' / 'oldest.txt'
  assert [line for line in machine.log() if line.startswith('constraint')] == [
    f'constraint {constraints}', 'constraint none']
  # The lowest of every requirement.
  text = (ROOT / 'setup.py').read_text().partition('install_requires=[')[2].partition('  ],')[0]
  lowest = constraints.read_text().splitlines()
  assert 'jax==0.10.*' in lowest and 'orbax-checkpoint==0.12.8.*' in lowest
  assert len(lowest) == len(text.strip().splitlines())


@pytest.mark.parametrize(('old', 'status', 'line'), [
  (OLD, 3, f'oldest: failed with status 3 ({OLD})'),
  (NEW, 0, f'oldest: failed, {NEW} is not python3.11 with jax 0.10')])
def test_an_end_that_fails_does_not_end_the_other(old, status, line, machine, tmp_path):
  end(machine, 'python3.11', old, status)
  end(machine, 'mine', NEW)
  given = {'INSTRUCTJAX_NEWEST': str(tmp_path / 'bin' / 'mine')}
  done = versions(machine, tmp_path, **given)
  assert done.returncode == 1
  assert done.stdout.splitlines()[-2:] == [line, f'newest: passed ({NEW})']
  assert not (tmp_path / 'ends' / 'newest').exists(), 'one that has all is used as it is'


def test_a_python_that_is_not_there_is_skipped_and_said(machine, tmp_path):
  end(machine, 'python3.11', OLD)
  machine.add('python3.12', 'exit 127')
  done = versions(machine, tmp_path)
  skipped = 'newest: skipped, this machine has no python3.12 with the venv module'
  assert done.returncode == 0 and done.stdout.splitlines()[-1] == skipped
  # But nothing tested is no pass.
  done = versions(machine, tmp_path, '--only', 'newest')
  assert done.returncode == 1 and done.stdout == f'{skipped}\n'
