"""Milliseconds, load time and added memory of onnxruntime on the same network, one model a process.

    python onnxruntime_features.py MODEL.onnx --threads 1 [--exact] [--rounds 40]

prints one JSON line. `--exact` forbids the saturating 8-bit products of processors without VNNI.
"""

import argparse
import json
import pathlib
import time

import numpy as np
import onnxruntime


def memory_mb(field):
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=40)
    arguments.add_argument("--exact", action="store_true")
    arguments = arguments.parse_args()

    before = memory_mb("VmRSS")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    options.inter_op_num_threads = 1
    if arguments.exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(arguments.model, options, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - start
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    times = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        session.run(None, {"image": image})
        times.append(time.perf_counter() - start)
    times.sort()
    print(
        json.dumps(
            {
                "median_ms": round(1e3 * times[len(times) // 2], 2),
                "best_ms": round(1e3 * times[0], 2),
                "load_ms": round(1e3 * load, 1),
                "memory_mb": round(memory_mb("VmHWM") - before, 1),
            }
        )
    )


main()
