import os
import select
import signal
import subprocess
import sys

import pytest

from tests.support.processes import ended_popen

EXEC = [sys.executable, "-m", "muxmesh.supervisor.exec_with_parent"]


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped by a signal"])
def test_the_program_dies_with_its_parent(is_stopped: bool) -> None:
    program = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"]
    script = (
        "import os, subprocess, time\n"
        f"child = subprocess.Popen([*{EXEC!r}, str(os.getpid()), *{program!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with ended_popen(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        if is_stopped:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        parent.kill()
        parent.wait()
    try:
        readable, _, _ = select.select([pidfd], [], [], 20)
        if not readable:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    assert readable, "the child survived its parent"


def test_the_program_gets_its_arguments_and_the_pid_of_the_launcher() -> None:
    script = "import os, sys; print(os.getpid(), sys.argv[1:])"
    command = [*EXEC, str(os.getpid()), sys.executable, "-c", script, "--port", "", "a b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        stdout, _ = process.communicate(timeout=30)
    assert stdout == f"{process.pid} ['--port', '', 'a b']\n"


def test_the_program_does_not_run_if_the_parent_is_dead() -> None:
    command = [*EXEC, str(os.getppid()), sys.executable, "-c", "print('runs')"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"process {os.getppid()} is not the parent of this one, or has exited; ")
