"""Kill runs at random moments, go on, and see that nothing is lost: in the end, the same bytes.

    python tests/kill_runs.py --kills 50 --workers 2

A round makes a study, often first of fewer models or without test images, and kills it on the way, a few
times or never at each stage. Then it is finished and compared, byte by byte, with one that was never killed.
"""

import argparse
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import processes

import modelsim as ms

STAGES = (["mab"], ["ab", "mab"], ["ba", "mab"], ["b", "mab"], ["b", "ab", "mab"])
"""Models of the runs of one round; the last is always of all."""

FINISHED = "all"


def state(out, names, *, is_tested):
    """Say how far a run came; raises if what it left is damaged."""
    try:
        study = ms.open_study(out)
    except FileNotFoundError:
        return "no store"
    except ValueError as error:
        unfinished = re.search(r"has (\d of \d sources): run the same", str(error))
        if not unfinished:
            raise
        return unfinished[1]
    is_there = study.source.values.tolist() == list(names) and is_tested <= ("test_image" in study)
    return FINISHED if is_there else "the finished store of fewer models"


class Killer:
    """Runs studies in a folder of its own, and kills them."""

    def __init__(self, folder, *, workers, seed):
        self.folder, self.workers, self.random = Path(folder), workers, random.Random(seed)
        self.killed, self.rounds, self.expected, self.seconds = Counter(), 0, {}, 0.0

    def start(self, out, names, **options):
        given = dict(pauses=self.folder / "pauses", workers=self.workers)
        return processes.start(processes.transfer_by_forks, str(out), names, **given, **options)

    def finish(self, out, names, **options):
        """Run without a kill."""
        code = processes.end(self.start(out, names, **options))
        assert code == 0, f"a run of {names} in {out} ended with {code}"

    def never_killed(self, *, perturbations):
        """Return the files of the study of all models, with test images."""
        if perturbations not in self.expected:
            out, begun = self.folder / f"never-killed-{perturbations}", time.monotonic()
            self.finish(out, STAGES[0][-1], perturbations=perturbations, is_tested=True)
            self.seconds = time.monotonic() - begun
            self.expected[perturbations] = processes.files(out)
        return self.expected[perturbations]

    def kill_once(self, out, names, *, is_tested, **options):
        """Start a run and kill it at a random moment; return whether it has been killed before its end."""
        process = self.start(out, names, is_tested=is_tested, **options)
        process.join(self.random.uniform(0, self.seconds))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        code = processes.end(process)
        assert code in (0, -signal.SIGKILL), f"a run of {names} in {out} ended with {code}"
        left = state(out, names, is_tested=is_tested)
        if code and left != FINISHED:
            self.killed[left] += 1
        return code != 0 and left != FINISHED

    def round(self, kills):
        """Make one study with up to `kills` kills on the way."""
        out, perturbations = self.folder / f"round-{self.rounds}", self.random.random() < 0.8
        self.rounds += 1
        expected, is_tested = self.never_killed(perturbations=perturbations), False
        stages = self.random.choice(STAGES)
        for number, names in enumerate(stages, 1):
            is_tested = is_tested or number == len(stages) or self.random.random() < 0.5
            options = dict(perturbations=perturbations, is_tested=is_tested)
            at_most = min(kills, self.random.randint(0, 6))
            while at_most > 0 and self.kill_once(out, names, **options):
                at_most, kills = at_most - 1, kills - 1
        self.finish(out, names, **options)
        found = processes.files(out)
        differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not differing, f"{out} differs from a study never killed in {sorted(differing)}"


def kill_runs(folder, *, kills, workers=1, seed=0):
    """Kill runs at `kills` random moments; return how often they left what behind."""
    processes.end(processes.start(int))  # the first process to start takes seconds to import torch
    killer = Killer(folder, workers=workers, seed=seed)
    while (left := kills - killer.killed.total()) > 0:
        killer.round(left)
    return killer.killed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killed = kill_runs(folder, kills=given.kills, workers=given.workers, seed=given.seed)
    print(f"{killed.total()} kills with workers={given.workers}, seed {given.seed}; each left behind")
    for left, times in killed.most_common():
        print(f"{times:4d} × {left}")
    print("Every study had, in the end, the bytes of one that was never killed.")


if __name__ == "__main__":
    main()
