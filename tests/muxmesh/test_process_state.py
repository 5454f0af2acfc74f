"""The states of real processes."""

import os
import signal
import subprocess
import sys

from muxmesh.process_state import ProcessState, has_ended, process_state
from tests.support.debugged_process import debugged_process


def test_a_process_runs_is_stopped_by_a_signal_and_continues() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        try:
            assert process_state(process.pid) is ProcessState.RUNNING
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            assert process_state(process.pid) is ProcessState.STOPPED
            process.send_signal(signal.SIGCONT)
            os.waitid(os.P_PID, process.pid, os.WCONTINUED)
            assert process_state(process.pid) is ProcessState.RUNNING
        finally:
            process.kill()
    assert process_state(process.pid) is ProcessState.RUNNING, "it has exited"


def test_a_process_that_a_debugger_has_stopped_is_traced() -> None:
    with debugged_process() as pid:
        assert process_state(pid) is ProcessState.TRACED


def test_a_process_has_ended_when_it_exits_before_it_is_reaped() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        assert not has_ended(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(process.pid)
    assert has_ended(process.pid)
