"""The speed table of pass-edge's README, all runtimes in one run, in turns, one process a measurement.

    python table.py --pass-edge PATH/pass-edge --tiny TI.exact.pass TI.fast.pass --small S.exact.pass S.fast.pass \
        [--rten PATH/pass-peer-rten] [--rounds 3] [--kernel auto]

needs onnx, onnxruntime and numpy. The .pass files are ViT-Ti/16 and ViT-S/16 at 224x224 of any weights; the ONNX files are
written here (vit_onnx.py) and quantized by onnxruntime: dynamic int8, per channel, 8-bit and 7-bit weights. For every cell
the median over rounds of the median time in a round is printed, and all rounds below the table.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from vit_onnx import vit

HERE = pathlib.Path(__file__).parent
IMAGES = "40"


def onnx_files(folder):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = {}
    for size in ("tiny", "small"):
        files[size, "f32"] = folder / f"{size}.onnx"
        vit(size, files[size, "f32"])
        for bits, reduce in (("int8", False), ("int7", True)):
            files[size, bits] = folder / f"{size}.{bits}.onnx"
            quantize_dynamic(
                files[size, "f32"],
                files[size, bits],
                per_channel=True,
                reduce_range=reduce,
                weight_type=QuantType.QInt8,
            )
    return files


def run(command, **environment):
    output = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    return json.loads(output.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass-edge", required=True)
    parser.add_argument("--tiny", nargs=2, required=True, metavar="PASS")
    parser.add_argument("--small", nargs=2, required=True, metavar="PASS")
    parser.add_argument("--rten")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernel", default="auto")
    arguments = parser.parse_args()

    own = {"tiny": arguments.tiny, "small": arguments.small}
    with tempfile.TemporaryDirectory() as folder:
        files = onnx_files(pathlib.Path(folder))

        def pass_edge(mode, size, threads):
            model = own[size][mode]
            options = ["--threads", str(threads), "--kernel", arguments.kernel, "--rounds", IMAGES, "--json"]
            found = run([arguments.pass_edge, "bench", model, *options])
            return {
                "median_ms": found["kernels"][0]["median_ms"],
                "load_ms": found["load_ms"],
                "memory_mb": found["rss_bytes"] / 2**20,
            }

        def onnxruntime(bits, exact):
            flags = ["--exact"] if exact else []
            script = str(HERE / "onnxruntime_features.py")
            return lambda size, threads: run(
                [sys.executable, script, str(files[size, bits]), "--threads", str(threads), "--rounds", IMAGES, *flags]
            )

        def rten(size, threads):
            return run([arguments.rten, str(files[size, "int7"]), IMAGES], RTEN_NUM_THREADS=str(threads))

        runtimes = {
            "pass-edge exact (8-bit weights)": lambda size, threads: pass_edge(0, size, threads),
            "pass-edge fast (7-bit weights)": lambda size, threads: pass_edge(1, size, threads),
            "onnxruntime dynamic int8, 7-bit weights": onnxruntime("int7", False),
            "onnxruntime dynamic int8, 8-bit weights": onnxruntime("int8", False),
            "onnxruntime, its exact switch, 8-bit weights": onnxruntime("int8", True),
            "onnxruntime f32": onnxruntime("f32", False),
        }
        if arguments.rten:
            runtimes["rten int8, 7-bit weights"] = rten
        cells = [(size, threads) for size in ("tiny", "small") for threads in (1, 2)]
        found = {(name, cell): [] for name in runtimes for cell in cells}
        for _ in range(arguments.rounds):
            for cell in cells:
                for name, measure in runtimes.items():
                    found[name, cell].append(measure(*cell))

    def median(name, cell, key):
        return statistics.median(one[key] for one in found[name, cell])

    print("| ms an image, 224x224, batch 1 | Ti/16, 1 / 2 threads | S/16, 1 / 2 threads | load ms Ti / S | peak MB Ti / S |")
    print("|---|---|---|---|---|")
    for name in runtimes:
        times = [f"{median(name, cell, 'median_ms'):.1f}" for cell in cells]
        load, memory = ([median(name, (size, 1), key) for size in ("tiny", "small")] for key in ("load_ms", "memory_mb"))
        print(
            f"| {name} | {times[0]} / {times[1]} | {times[2]} / {times[3]} "
            f"| {load[0]:.1f} / {load[1]:.1f} | {memory[0]:.0f} / {memory[1]:.0f} |"
        )
    print()
    for name in runtimes:
        rounds = [" ".join(f"{one['median_ms']:.2f}" for one in found[name, cell]) for cell in cells]
        print(f"{name}: {' | '.join(rounds)}")


main()
