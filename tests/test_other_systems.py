"""What a machine without POSIX's modules, signals and calls has to go without: nothing that trains."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers import slow

# Libraries are imported before: which of them need what is their business.
SCRIPT = """
import multiprocessing, os, signal, sys
import filelock, matplotlib.pyplot, pandas, PIL.Image, pyarrow.parquet, pydantic, rich.progress, scipy.stats, seaborn
import sklearn.datasets, statsmodels.api, torch, torch._dynamo, torch.distributed._tools.mem_tracker, torchvision

for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty"):
    sys.modules[name] = None
for name in ("fork", "killpg", "getuid", "statvfs", "sched_getaffinity", "setsid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGALRM", "SIGKILL", "SIGHUP", "SIGCHLD", "SIGUSR1"):
    if hasattr(signal, name):
        delattr(signal, name)

from layerlab import build_model, compare, load_dataset, save_model, load_model, strategies

data = load_dataset("digits", limit=128, test_limit=32, device="cpu")
network = lambda: build_model("resnet-cifar", num_classes=10, channels=1, depth=8)
arms = {"full": (), "skip": strategies("lars-skip")}
for _ in range(2):
    both = compare(network, data, arms, epochs=2, batch_size=32, checkpoint=sys.argv[1], progress=False)
file = save_model(sys.argv[1] + "/model.pt", both.results["skip", 0], data, "resnet-cifar", channels=1, depth=8)
print(both.arms, load_model(file).top1 == both.results["skip", 0].final["test/top1"])
print(os.listdir(sys.argv[1] + "/skip-seed0"))
"""


@slow
def test_it_imports_trains_resumes_and_saves_without_posix(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    answer = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True,
                            env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert answer.stdout.splitlines() == ["['full', 'skip'] True", "['state.pt']"]
