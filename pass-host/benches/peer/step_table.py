"""One training step, ours and PyTorch's in turns: a table of every round, ratios, and the share of the arithmetic floor.

    cargo bench -p pass-host --bench step --no-run            prints the path of the program
    python step_table.py --program target/release/deps/step-XXXX [--rounds 5] [--steps 6] [--threads 2]
                         [--case vit_tiny:4 --case vit_small:2] [--json] [--ours --recompute]

Every run is a process of its own, so peak memory is the kernel's figure for it. A ratio below 1 means that ours is faster or
smaller. The floor is the multiply-adds that our step needs, divided by the speed of one large product measured by our program in
the same run. On a machine that others use, wall times of single rounds mean little: compare processor seconds with `--threads 1`
(PyTorch's threads spin while they wait, which counts as processor time).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def pair(args, arch, batch):
    """One run of each program, ours first."""
    common = ["--arch", arch, "--batch", str(batch), "--threads", str(args.threads), "--steps", str(args.steps)]
    ours = run([args.program, *common, *args.ours])
    peer = run([sys.executable, str(Path(__file__).with_name("step.py")), *common, "--json"])
    return ours, peer


COLUMNS = {
    "median of a round, s": "seconds_median",
    "fastest step, s": "seconds_min",
    "processor seconds a step": "cpu_seconds",
    "peak memory, MB": "peak_mb",
}


def table(arch, batch, args):
    rounds = [pair(args, arch, batch) for _ in range(args.rounds)]
    result = {"arch": arch, "batch": batch, "threads": args.threads, "steps": args.steps, "rows": {}}
    for title, key in COLUMNS.items():
        ours, peer = ([side[key] for side in sides] for sides in zip(*rounds))
        result["rows"][title] = {
            "ours": ours,
            "pytorch": peer,
            "ratios": [a / b for a, b in zip(ours, peer)],
            "ratio_of_medians": statistics.median(ours) / statistics.median(peer),
        }
    ours = [side for side, _ in rounds]
    result["gmac"] = ours[0]["gmac"]
    result["product_gmac_per_s"] = [round["product_gmac_per_s"] for round in ours]
    result["share_of_floor"] = [round["share_of_floor"] for round in ours]
    return result


def show(result):
    numbers = lambda values: " ".join(f"{value:.4g}" for value in values)
    print(f"{result['arch']}, batch {result['batch']}, {result['threads']} threads, {result['steps']} steps a round")
    for title, row in result["rows"].items():
        print(f"  {title}")
        print(f"    ours     {numbers(row['ours'])}")
        print(f"    PyTorch  {numbers(row['pytorch'])}")
        print(f"    ratio    {numbers(row['ratios'])}   of medians {row['ratio_of_medians']:.3f}")
    print(f"  multiply-adds a step: {result['gmac']:.1f} billion")
    print(f"  one large product, billion a second: {numbers(result['product_gmac_per_s'])}")
    print(f"  share of that floor reached: {numbers(result['share_of_floor'])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="the `step` benchmark as built by cargo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", action="append", metavar="ARCH:BATCH", help="default: vit_tiny:4 and vit_small:2")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="the rest goes to our program")
    parser.add_argument("--json", action="store_true", help="one line of JSON a case")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    for case in args.case or ["vit_tiny:4", "vit_small:2"]:
        arch, _, batch = case.partition(":")
        if not batch.isdigit():
            parser.error(f"--case {case}: expected ARCH:BATCH, for example vit_tiny:4")
        result = table(arch, int(batch), args)
        print(json.dumps(result)) if args.json else show(result)


if __name__ == "__main__":
    main()
