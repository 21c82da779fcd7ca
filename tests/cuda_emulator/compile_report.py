# SPDX-License-Identifier: Apache-2.0
"""What compiling the CUDA kernels costs: ``python tests/cuda_emulator/compile_report.py [architecture ..]``.

Prints, per architecture, entry points, bytes of machine code, seconds of one core from scratch, and the most
registers, shared bytes and spilled bytes of any kernel.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cuda_compiler import ARCHITECTURES, cubin_command, parse_resources
from emulator_build import KERNELS


def row(architecture: int, folder: Path) -> str:
    """Compile all files, nothing kept from before."""
    begin, size, found = time.perf_counter(), 0, []
    for source in KERNELS:
        target = folder / f"{source.stem}.cubin"
        command = [*cubin_command(source, architecture), str(source), "-o", str(target)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        found += parse_resources(log).values()
        size += target.stat().st_size
    seconds = time.perf_counter() - begin
    names = ("registers", "shared_bytes", "spill_bytes")
    most = " | ".join(str(max(getattr(used, name) for used in found)) for name in names)
    return f"| sm_{architecture} | {len(found)} | {size / 1e6:.1f} | {seconds:.0f} | {most} |"


def main() -> None:
    """Print a Markdown table."""
    print("| architecture | entry points | MB | seconds | registers | shared bytes | spilled bytes |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in map(int, sys.argv[1:]) if sys.argv[1:] else ARCHITECTURES:
            print(row(architecture, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
