# SPDX-License-Identifier: Apache-2.0
"""`python -m pfnas_fast`, which is also what `torchrun -m pfnas_fast` starts."""

from pfnas_fast.cli import main

main()
