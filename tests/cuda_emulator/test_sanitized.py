# SPDX-License-Identifier: Apache-2.0
"""The tests of the real kernels once more, with ASan and UBSan watching every access of their source.

In a process of its own: the sanitizers must be there before Python. What runs is every test of this folder
that calls kernels compiled from source (see conftest.py); a report ends the process, so it fails the test.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator_build import ROOT, sanitizer_environment

HERE = Path(__file__).parent
AT_LEAST = 560  # tests: what is left out unnoticed proves nothing


@pytest.mark.tier2
def test_real_kernels_are_clean(emulator: str) -> None:
    options = ("--sanitized", "-q", "-p", "no:cacheprovider", "-m", "not tier2")
    # A report goes to the process's own stderr: pytest must not take that, the report would die with it.
    capture = "--capture=sys"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE), *options, capture],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=sanitizer_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = re.search(r"(\d+) passed, \d+ deselected", done.stdout)
    assert counts is not None, done.stdout[-500:]
    assert int(counts[1]) >= AT_LEAST
    assert "skipped" not in done.stdout
    print(f"{counts[1]} tests under ASan and UBSan")
