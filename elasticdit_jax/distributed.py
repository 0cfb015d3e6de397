"""Several processes as one job: joining, agreeing, waiting for each other with a time-out that names who is missing.

Every host (or every GPU) runs the same command. All talk through the key-value store of JAX's coordination service,
which process 0 runs; nothing here touches a device, so that it works before the first array and beside hung ones.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

JOIN_SECONDS = 300  # for all processes to start
WAIT_SECONDS = 900  # for the slowest: one that compiles or draws pictures while the others wait
_HOST = "elasticdit/host"


def expected(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether this process was started as one of several: by a TPU pod, Slurm, MPI, or JAX_COORDINATOR_ADDRESS.

  Args:
    environment: variables to read.
  """
  if environment.get("JAX_COORDINATOR_ADDRESS") or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
    return True
  if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "," in environment.get("TPU_PROCESS_ADDRESSES", ""):
    return True
  counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
  return any(environment.get(name, "1") not in ("", "1") for name in counts)


def has_tpu(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether there are TPU chips here, as far as one can tell without touching them: JAX may know their other hosts."""
  names = [*_listed("/dev"), *(f"accel{name}" for name in _listed("/dev/vfio"))]
  return any(re.fullmatch(r"accel\d+", name) for name in names) and "TPU_SKIP_MDS_QUERY" not in environment


def _listed(directory: str) -> list[str]:
  return os.listdir(directory) if os.path.isdir(directory) else []


def initialize(coordinator: str | None, processes: int | None, index: int | None, seconds: int = JOIN_SECONDS) -> int:
  """Joins the other processes; must come before anything that touches a device. A process alone needs nothing.

  Args:
    coordinator: "host:port" of process 0; None where the environment knows (TPU pods, Slurm, MPI).
    processes: how many there are; None likewise.
    index: which of them this is; None likewise.
    seconds: how long to wait for the others.

  Returns:
    How many processes there are.

  Raises:
    ValueError: where some of the three are given and the others cannot be found, or a CPU host does not know its name.
    TimeoutError: where process 0 cannot be reached, or its port is taken.
  """
  given = {"--coordinator": coordinator, "--processes": processes, "--process": index}
  environment = {"--processes": "JAX_NUM_PROCESSES", "--process": "JAX_PROCESS_ID"}
  certain = any(value is not None for value in given.values()) or expected()
  if not certain and not has_tpu():
    return 1
  for flag, variable in environment.items():
    if given[flag] is None and os.environ.get(variable):
      given[flag] = int(os.environ[variable])
  try:
    _join(given, seconds)
  except (ValueError, TimeoutError) as e:
    if certain:
      raise
    logging.info("one host, as far as is known here (%s)", e)
  return jax.process_count()


@contextlib.contextmanager
def joined(*place: Any, **options: Any) -> Iterator[int]:
  """`initialize` on entry; on leaving, waits until the others leave too. Where an error ends a process, it just goes.

  Args:
    *place, **options: see initialize.

  Yields:
    How many processes there are.
  """
  count = initialize(*place, **options)
  try:
    yield count
  except SystemExit as e:
    if not e.code and jax.distributed.is_initialized():
      jax.distributed.shutdown()
    raise
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def _join(given: dict[str, Any], seconds: int) -> None:
  address, processes, index = given.values()
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    _check_own_name()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  told = (
    f"after {0.9 * seconds:.0f} s not all {processes or ''} processes have joined at {address or 'process 0'}: start"
  )
  told += " the same command on every host, and let all of them reach that one"
  # JAX ends the process when its time is up, with a stack and without a word about this.
  timer = threading.Timer(0.9 * seconds, logging.error, (told,))
  timer.start()
  try:
    jax.distributed.initialize(address, processes, index, initialization_timeout=seconds)
  except (ValueError, TypeError) as e:
    text = ", ".join(f"{flag}={value}" for flag, value in given.items() if value is not None) or "the environment"
    raise ValueError(
      f"{text}: {e}; give all of --coordinator=HOST:PORT, --processes=N and --process=0..N-1, or none on one host"
    ) from e
  except RuntimeError as e:
    raise TimeoutError(
      f"{address or 'the coordinator'}: {_first_line(e)}; is it the address of process 0, and is its port free?"
    ) from e
  finally:
    timer.cancel()
  _client().key_value_set(f"{_HOST}/{jax.process_index()}", f"{socket.gethostname()}:{os.getpid()}")
  if jax.process_index():
    logging.set_verbosity(min(logging.get_verbosity(), logging.WARNING))


def _check_own_name() -> None:
  """Gloo listens at the address of this host's name, and says no more than a number where there is none."""
  name = socket.gethostname()
  try:
    socket.getaddrinfo(name, None)
  except OSError as e:
    raise ValueError(f"{name}, the name of this host, has no address ({e}); add it to /etc/hosts") from e


def _client() -> Any:
  """JAX has no public way to its key-value store; Orbax takes this one as well."""
  from jax._src import distributed  # noqa: PLC0415

  return distributed.global_state.client


def several() -> bool:
  """Whether there are other processes."""
  return jax.process_count() > 1


class _Counter:
  """Numbers the meetings of one name: every process holds each of them in the same order."""

  def __init__(self):
    self._next: dict[str, itertools.count] = {}

  def __call__(self, name: str) -> int:
    return next(self._next.setdefault(name, itertools.count()))


_meeting = _Counter()
_STOP = "stop"


def exchange(name: str, value: str = "", seconds: float = WAIT_SECONDS) -> list[str]:
  """What every process says under one name, by process; all must call it, in the same order.

  Args:
    name: of the meeting, for the message.
    value: of this process.
    seconds: how long to wait for the others.

  Raises:
    TimeoutError: naming the processes that did not come, and their hosts.
  """
  if not several():
    return [value]
  client, number, me = _client(), _meeting(name), jax.process_index()
  place = f"elasticdit/{name}/{number}"
  client.key_value_set(f"{place}/{me}", value)
  try:
    client.wait_at_barrier(place, int(1000 * seconds))
  except Exception as e:  # the kind depends on the version of JAX
    came = {int(key.rsplit("/", 1)[1]) for key, _ in client.key_value_dir_get(place)}
    missing = [i for i in range(jax.process_count()) if i not in came]
    if not missing:
      raise
    raise TimeoutError(
      f"{name}: waited {seconds:.0f} s for {described(missing)} of {jax.process_count()} processes; see their logs:"
      " they have stopped, hang, or are far behind"
    ) from e
  said = {int(key.rsplit("/", 1)[1]): text for key, text in client.key_value_dir_get(place)}
  if number:
    # Whoever came to this meeting has read what was said at the one before: process 0 need not remember it.
    client.key_value_delete(f"elasticdit/{name}/{number - 1}/{me}")
  return [said[i] for i in range(jax.process_count())]


def described(processes: Sequence[int]) -> str:
  """These of several processes, with host and number in its system, for a message."""
  hosts = {int(key.rsplit("/", 1)[1]): host for key, host in _client().key_value_dir_get(_HOST)}
  return ", ".join(f"process {i} ({hosts.get(i, 'never joined')})" for i in processes)


def barrier(name: str, seconds: float = WAIT_SECONDS) -> None:
  """Waits until every process is here; see `exchange`."""
  exchange(name, "", seconds)


def on_first(name: str, work: Callable[[], None], seconds: float = WAIT_SECONDS) -> None:
  """Process 0 works, the others wait; where it fails, all fail.

  Args:
    name: of the work, for the message.
    work: what to do.
    seconds: how long the others wait.

  Raises:
    OSError: on the other processes, where process 0 raised; process 0 raises what it raised.
    TimeoutError: see `exchange`.
  """
  if not several():
    work()
    return
  error: BaseException | None = None
  if jax.process_index() == 0:
    try:
      work()
    except Exception as e:
      error = e
  said = exchange(name, "" if error is None else f"{type(error).__name__}: {_first_line(error)}", seconds)
  if error is not None:
    raise error
  if said[0]:
    raise OSError(f"{name}: process 0 failed: {said[0]}")


def from_first(name: str, value: Any) -> Any:
  """What process 0 holds: a JSON value that counts on every process, whatever these hold themselves.

  Args:
    name: of the value, for the message.
    value: of this process; only that of process 0 is read.

  Raises:
    TimeoutError: see `exchange`.
  """
  if not several():
    return value
  return json.loads(exchange(name, json.dumps(value) if jax.process_index() == 0 else "")[0])


def check_same(name: str, values: Mapping[str, Any]) -> None:
  """Compares what every process holds with what process 0 holds.

  Args:
    name: what is compared, for the message.
    values: flat, JSON values.

  Raises:
    ValueError: on every process, naming the first process that differs and the fields.
  """
  said = [json.loads(text) for text in exchange(f"comparing {name}", json.dumps(dict(values), default=str))]
  for i, other in enumerate(said):
    # As JSON, where NaN is like NaN: whether a value may be one is not asked here.
    fields = [
      f for f in sorted(said[0].keys() | other.keys()) if json.dumps(said[0].get(f)) != json.dumps(other.get(f))
    ]
    if fields:
      shown = "; ".join(f"{f}: {said[0].get(f)!r} and {other.get(f)!r}" for f in fields[:4])
      raise ValueError(
        f"{name}: process 0 and process {i} differ in {len(fields)} fields ({shown}); start the same command with the"
        " same files on every host"
      )


def stop_requested() -> bool:
  """Whether all processes should stop now, because one of them got SIGTERM; the same answer everywhere.

  Every process must ask equally often: after every step, and at every meeting of a step that waits.
  """
  if not several():
    return False
  from jax.experimental import multihost_utils  # noqa: PLC0415

  # JAX names one number at which all stop: numbers must not leave any out.
  return multihost_utils.reached_preemption_sync_point(_meeting(_STOP))


def _first_line(e: BaseException) -> str:
  text = str(e).strip().splitlines()
  return text[0][:200] if text else type(e).__name__
