"""What one GPU shows in a limited time: `make gpu MINUTES=30`, or `python -m benchmarks.gpu --minutes 30`.

First the GPU tests, then speed and memory against the plain loops, then the paper profile's rows on CIFAR-10, cheapest
first, with memory against unrolled steps among them. Records go to the results folder. A part that is done is skipped
the next time; a run that the time cuts off is stopped as Ctrl-C stops it, and goes on from its checkpoint. Ends with 1
if a part failed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time

from benchmarks.__main__ import PARTS
from ddlib.files import results_folder

# (method, IPC, overrides), by what the arithmetic says that a run costs; experts come before the runs that need them.
ROWS = [
    ("random", 1, ""),
    ("dm", 1, ""),
    ("random", 10, ""),
    ("dm", 10, ""),
    ("frepo", 1, "iterations=20000"),
    ("dm", 50, ""),
    ("idc", 10, "iterations=40"),
    ("dream", 10, "iterations=40"),
    ("dream_plus", 10, "iterations=40"),
    ("mtt", 1, "experts=20"),
    ("tesla", 1, "experts=20"),
    ("ftd", 1, "experts=20"),
    ("mtt", 10, "experts=20"),
    ("tesla", 10, "experts=20"),
    ("ftd", 10, "experts=20"),
    ("dsa", 1, ""),
    ("frepo", 10, ""),
]
NEED_EXPERTS = ("mtt", "tesla", "ftd")
STUDY = """import ddlib as dd
from ddlib.studies import trajectories as studies
spec = dd.resolve("mtt", "{dataset}", {ipc}, "paper", experts=20)
studies.unrolling(spec, steps=[1, 2, 5, 10, 20, 50, 100], device="{device}", largest=100 * 2**30)"""


def commands(dataset: str, device: str) -> list[list[str]]:
    """The parts in order, each as the arguments of the interpreter."""
    bench = results_folder() / "bench"
    parts = [["-m", "pytest", "-q", "-m", "gpu", "tests"]] if device == "cuda" else []
    for name in PARTS:
        if not (out := bench / f"{name}_{device}.json").is_file():
            parts.append(
                ["-m", "benchmarks", "--only", name, "--device", device, "--out", str(out)]
            )
    for method, ipc, changes in ROWS:
        options = [
            method,
            "--dataset",
            dataset,
            "--ipc",
            str(ipc),
            "--profile",
            "paper",
            "--device",
            device,
        ]
        options += ["--set", changes] if changes else []
        parts += [["-m", "ddlib", "experts", *options]] if method in NEED_EXPERTS else []
        if method == "mtt":  # memory, time and fidelity against unrolled steps
            parts += [
                ["-c", STUDY.format(dataset=dataset, ipc=k, device=device)]
                for k in ((1,) if ipc == 1 else (10, 50))
            ]
        parts.append(["-m", "ddlib", "run", *options, "--checkpoint-every", "1000"])
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--dataset", default="cifar10", help="CIFAR-10, or folder:PATH with the same images"
    )
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    end, failed = time.monotonic() + 60 * args.minutes, 0
    (results_folder() / "bench").mkdir(parents=True, exist_ok=True)
    for part in commands(args.dataset, args.device):
        print(f"\n== {' '.join(part)}", flush=True)
        start, process = time.monotonic(), subprocess.Popen([sys.executable, *part])
        try:
            code = process.wait(max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            print(f"== the {args.minutes:g} minutes are over; the same command goes on from here")
            break
        failed += code != 0
        print(
            f"== {'done' if code == 0 else f'ended with {code}'} in {time.monotonic() - start:.0f} s",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
