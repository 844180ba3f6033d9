"""Seconds count while a process runs, and not while it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows neither stops processes so nor forks them")
SHORT = "from layerlab.measure import running as module; module.TICK, module.LONGEST = 0.05, 0.5\n"
STOPPED = SHORT + """
import sys
module.running(); start = module.running()
print("ready", flush=True)
sys.stdin.readline()
print(module.running() - start, flush=True)
"""
FORKED = SHORT + """
import os, time
module.running()
time.sleep(0.2)
if os.fork() == 0:
    start = module.running()
    time.sleep(1.5)
    print(module.running() - start, flush=True)
    os._exit(0)
os.wait()
"""
BUSY = SHORT + """
import time
start = module.running()
# One call into C that lets no other thread run.
sum(range(60_000_000))
print(module.running() - start, flush=True)
"""


@pytest.fixture
def process():
    made = []

    def start(text: str) -> subprocess.Popen[str]:
        made.append(subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     text=True))
        return made[-1]

    yield start
    for each in made:
        each.kill()


def test_a_process_that_was_stopped_does_not_count_it(process):
    one = process(STOPPED)
    one.stdout.readline()
    start = time.monotonic()
    os.kill(one.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(one.pid, signal.SIGCONT)
    told, _ = one.communicate("\n", timeout=60)
    # Whatever else the machine did, the three seconds are not in it.
    assert float(told) < time.monotonic() - start - 2


def test_a_fork_looks_at_the_clock_by_itself(process):
    told, _ = process(FORKED).communicate(timeout=60)
    assert float(told) >= 1.4


def test_work_that_lets_no_other_thread_run_counts(process):
    told, _ = process(BUSY).communicate(timeout=60)
    assert float(told) >= 0.5
