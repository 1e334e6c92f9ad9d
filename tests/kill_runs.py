"""Kill runs at random moments, go on, and see that nothing is lost: in the end, the same bytes.

    python tests/kill_runs.py --kills 50 --workers 2

A round makes a study, often first of fewer models or without test images, and kills it on the way, a few
times or never at each stage. Then it is finished and compared, byte by byte, with one that was never killed.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import processes
import tiny

import modelsim as ms

STAGES = (["ab"], ["mab"], ["b", "mab"], ["ba", "mab"], ["b", "ab", "mab"])


def state(out):
    """Say how far a run came; raises if what it left is damaged."""
    try:
        ms.open_study(out)
    except FileNotFoundError:
        return "no store yet"
    except ValueError as error:
        if "of" not in str(error) or "sources: run the same" not in str(error):
            raise
        return str(error).partition(" has ")[2].partition(":")[0]
    return "finished"


class Killer:
    """Runs studies in a folder of its own, and kills them."""

    def __init__(self, folder, *, workers, seed):
        self.folder, self.workers, self.random = Path(folder), workers, random.Random(seed)
        self.killed, self.rounds, self.seconds, self.expected = Counter(), 0, {}, {}

    def start(self, out, names, *, is_tested):
        test_images = tiny.image_set(30, seed=1) if is_tested else None
        given = dict(pauses=self.folder / "pauses", workers=self.workers, test_images=test_images)
        return processes.start(processes.transfer_by_forks, str(out), names, **given)

    def finish(self, out, names, *, is_tested):
        """Run without a kill; return the seconds that it took."""
        begun = time.monotonic()
        code = processes.end(self.start(out, names, is_tested=is_tested))
        assert code == 0, f"a run of {names} in {out} ended with {code}"
        return time.monotonic() - begun

    def reference(self, names, *, is_tested):
        key = (names, is_tested)
        if key not in self.expected:
            out = self.folder / f"never-killed-{names}-{is_tested}"
            self.seconds[key] = self.finish(out, names, is_tested=is_tested)
            self.expected[key] = processes.files(out)
        return self.expected[key]

    def kill_once(self, out, names, *, is_tested):
        """Start a run and kill it at a random moment; return whether it was still running."""
        self.reference(names, is_tested=is_tested)
        process = self.start(out, names, is_tested=is_tested)
        time.sleep(self.random.uniform(0, 1.1 * self.seconds[names, is_tested]))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        code = processes.end(process)
        assert code in (0, -signal.SIGKILL), f"a run of {names} in {out} ended with {code}"
        if code:
            self.killed[state(out)] += 1
        return bool(code)

    def round(self, kills):
        """Make one study with up to `kills` kills on the way."""
        out = self.folder / f"round-{self.rounds}"
        self.rounds += 1
        is_tested = False
        for names in self.random.choice(STAGES):
            is_tested = is_tested or self.random.random() < 0.5
            for _ in range(min(kills, self.random.randint(0, 4))):
                kills -= self.kill_once(out, names, is_tested=is_tested)
        self.finish(out, names, is_tested=is_tested)
        expected, found = self.reference(names, is_tested=is_tested), processes.files(out)
        differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not differing, f"{out} differs from a study never killed in {sorted(differing)}"


def kill_runs(folder, *, kills, workers=1, seed=0):
    """Kill runs at `kills` random moments; return how often they had come how far."""
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
    print(f"{killed.total()} kills with workers={given.workers}, seed {given.seed}; when killed, a run had")
    for how_far, times in killed.most_common():
        print(f"{times:4d} × {how_far}")
    print("Every study had, in the end, the bytes of one that was never killed.")


if __name__ == "__main__":
    main()
