"""How long `wellposed --help` takes, as a whole process, beside a bare interpreter."""

import statistics
import subprocess
import sys
import time

RUNS = 15


def seconds(*command):
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main():
    commands = {
        "python -c pass": (sys.executable, "-c", "pass"),
        "wellposed --help": (sys.executable, "-m", "wellposed.cli", "--help"),
        "python -c 'import torch'": (sys.executable, "-c", "import torch"),
    }
    for command in commands.values():
        seconds(*command)
    times = {name: [] for name in commands}
    for _ in range(RUNS):
        for name, command in commands.items():
            times[name].append(seconds(*command))
    for name, values in times.items():
        print(f"{name:<26} median {1e3 * statistics.median(values):6.0f} ms of {RUNS} runs in turn")


if __name__ == "__main__":
    main()
