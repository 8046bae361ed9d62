"""Kill a run with SIGKILL at random moments, rerun it each time, and compare the finished model byte for byte.

python scripts/crash_study.py RECIPE [--kills 20] [--seed 0] [--set a.b=c ...]

Each trial starts from an empty run folder, is killed once at a uniformly random moment of a run's duration (a run that
ends before its moment does not count), and is then run to its end. Exit 1 when any `model/` differs from the whole one.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def model_digest(run_dir: Path) -> dict[str, str]:
    """sha256 of every file below `model/`."""
    files = sorted(p for p in (run_dir / "model").rglob("*") if p.is_file())
    return {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def command(args: argparse.Namespace, run_dir: Path) -> list[str]:
    sets = [word for value in args.set for word in ("--set", value)]
    return [sys.executable, "-m", "moecli", "run", args.recipe, "--run-dir", str(run_dir), *sets]


def run_to_end(args: argparse.Namespace, run_dir: Path) -> float:
    started = time.monotonic()
    done = subprocess.run(command(args, run_dir), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return time.monotonic() - started


def kill_after(args: argparse.Namespace, run_dir: Path, seconds: float) -> bool:
    """Start a run and kill it with its children. True when it was still running."""
    process = subprocess.Popen(
        command(args, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        import os

        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    moments = random.Random(args.seed)
    base = Path(tempfile.mkdtemp(prefix="crash-study-"))
    seconds = run_to_end(args, base / "whole")
    expected = model_digest(base / "whole")
    print(f"uninterrupted: {seconds:.1f} s, {len(expected)} files in model/")
    same = killed = 0
    while killed < args.kills:
        run_dir = base / f"trial-{killed}"
        moment = moments.uniform(0, seconds)
        if not kill_after(args, run_dir, moment):
            seconds = moment  # this run was quicker: a later moment would not hit one
            shutil.rmtree(run_dir)
            continue
        killed += 1
        rerun = run_to_end(args, run_dir)
        equal = model_digest(run_dir) == expected
        same += equal
        verdict = "same" if equal else "DIFFERENT"
        print(f"{killed:3d}: killed at {moment:6.1f} s, rerun {rerun:6.1f} s, {verdict}", flush=True)
        shutil.rmtree(run_dir)
    shutil.rmtree(base)
    print(f"{same} of {args.kills} identical by sha256")
    sys.exit(0 if same == args.kills else 1)


if __name__ == "__main__":
    main()
