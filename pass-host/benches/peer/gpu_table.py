"""The measurements of `gpu.sh` as result.json and table.md.

    python gpu_table.py OUT
"""

import json
import statistics
import sys
from pathlib import Path


def measurement(path):
    """Images a second, seconds of a step and memory, whoever measured it."""
    found = json.loads(path.read_text())
    seconds = found.get("seconds")
    record = {
        "images_per_s": found.get("images_per_s") or found["images_per_second"],
        "step_median_s": seconds["median"] if seconds else found["seconds_median"],
        "step_min_s": seconds["min"] if seconds else found["seconds_min"],
        "host_peak_mb": found.get("peak_memory_mb") or found.get("peak_mb"),
        "batch": found["batch"],
    }
    memory = path.with_suffix(".memory")
    if memory.exists():
        values = [int(line) for line in memory.read_text().split() if line.isdigit()]
        record["gpu_peak_mb"] = max(values, default=None)
    for key in ("tflops", "product_tflops", "share_of_product", "data_wait", "split", "device", "torch"):
        if key in found:
            record[key] = found[key]
    return record


def by_name(out, prefix):
    return {path.stem: measurement(path) for path in sorted(out.glob(f"{prefix}-*.json"))}


def main():
    out = Path(sys.argv[1])
    rounds, own, shard = (by_name(out, prefix) for prefix in ("round", "own", "shard"))
    tests = [json.loads(path.read_text()) for path in sorted(out.glob("test-*.json"))]
    result = {"largest": json.loads((out / "largest.json").read_text()), "tests": tests}
    result |= {"rounds": rounds, "own_largest": own, "from_shard": shard}

    lines = ["| | images/s, median of rounds | each round | step, s | GPU memory, MB |", "|---|---|---|---|---|"]
    medians = {}
    for who, title in [("pass", "pass"), ("eager", "PyTorch"), ("compiled", "PyTorch, compiled")]:
        found = [record for name, record in rounds.items() if f"-{who}-" in name]
        if not found:
            lines.append(f"| {title} | none finished | | | |")
            continue
        speeds = [record["images_per_s"] for record in found]
        medians[who] = statistics.median(speeds)
        step = statistics.median(record["step_median_s"] for record in found)
        memory = max((record.get("gpu_peak_mb") or 0 for record in found), default=0) or "?"
        each = ", ".join(f"{speed:.4g}" for speed in speeds)
        lines.append(f"| {title}, batch {found[0]['batch']} | {medians[who]:.4g} | {each} | {step:.4f} | {memory} |")
    for name, record in (own | shard).items():
        wait = f", data wait {100 * record['data_wait']:.1f} %" if name in shard else ""
        line = f"| {name}, batch {record['batch']}{wait} | {record['images_per_s']:.4g} | | {record['step_median_s']:.4f}"
        lines.append(f"{line} | {record.get('gpu_peak_mb', '?')} |")
    log = out / "training-metrics.jsonl"
    if log.exists():
        steps = [json.loads(line) for line in log.read_text().splitlines()]
        # a window that holds the first steps also holds the loading of the kernels
        settled = steps[len(steps) // 5 :]
        result["training"] = {
            "steps": steps[-1]["step"],
            "images_per_s": statistics.median(step["images_per_s"] for step in settled),
            "data_wait": statistics.median(step["data_wait"] for step in settled),
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
        }
        found = result["training"]
        line = f"| training, {found['steps']} steps, data wait {100 * found['data_wait']:.1f} %, loss {found['first_loss']:.3f} to"
        lines.append(f"{line} {found['last_loss']:.3f} | {found['images_per_s']:.4g} | | | |")
    result["ratio"] = {who: medians["pass"] / medians[who] for who in ("eager", "compiled") if {"pass", who} <= set(medians)}
    lines += ["", *(f"pass / {who}: {ratio:.2f}" for who, ratio in result["ratio"].items())]
    lines += [f"{test['program']}: {'passed' if test['exit_code'] == 0 else 'FAILED'}" for test in tests]

    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
