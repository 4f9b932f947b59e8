"""What `import ant_jax` adds to `import jax, flax, optax`, in seconds: medians of whole processes, run in turn.

python -m benchmarks.import_time [--rounds 7]
"""

import argparse
import statistics
import subprocess
import sys
import time


STATEMENTS = {"without": "import jax, flax, optax", "with": "import jax, flax, optax, ant_jax"}
TARGET = 0.3


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for statement in STATEMENTS.values():
        seconds(statement)  # the first time compiles bytecode and fills the disk's cache
    times = {name: [] for name in STATEMENTS}
    for _ in range(rounds):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    added = statistics.median(times["with"]) - statistics.median(times["without"])
    verdict = "met" if added <= TARGET else "MISSED"
    print(
        f"import ant_jax adds {added:.3f} s to {statistics.median(times['without']):.3f} s; target {TARGET} s {verdict}"
    )


if __name__ == "__main__":
    main()
