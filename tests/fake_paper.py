"""A paper for tests of running: what its plugin says of it, and cells of its notebook."""

from __future__ import annotations

from pathlib import Path

TESTS = str(Path(__file__).parent)
PAPER = """
title = "A paper"
authors = "A. Author"
year = 2020
venue = "A venue"
summary = "A summary."
formula = "x"
notebook = "notebook.ipynb"
[[claims]]
id = "gain"
statement = "a gain"
value = 3.0
unit = "points"
where = "Table I"
kind = "effect"
neutral = 0.0
tolerance = 0.5
conditions = { dataset = "imagenet" }
[profiles.quick]
description = "seconds"
[profiles.quick.parameters]
epochs = 4
pause = 0.0
[profiles.cpu]
description = "seconds, too"
[profiles.cpu.parameters]
epochs = 4
pause = 0.0
"""
OPEN = "from layerlab import Study\nstudy = Study('fake', profile, epochs=epochs, pause=pause)\np = study.parameters"
TRAIN = """
import sys
from layerlab import load_dataset
sys.path.insert(0, TESTS)
from helpers import Freezer, Residual
data = load_dataset("digits", device="cpu")
run = study.compare("main", Residual, data, {"plain": (), "frozen": Freezer(seconds=p.pause)}, epochs=p.epochs,
                    batch_size=256)
gains = [100 * (run.results["frozen", 0].final["test/top1"] - run.results["plain", 0].final["test/top1"])]
study.claim("gain", gains, seeds=[0], conditions={"dataset": "digits"})
"""
FINISH = "study.finish()"
