"""Every kernel of this device against the reference in fp64, in each dtype: the tolerance rule.

    python -m benchmarks.ops.numerics [--json FILE]

The same as `slap-fast doctor --parity`, as a record. Exit code 1 when a figure is over its bound.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks import harness
from slap_fast.diagnostics import parity


def figures() -> Iterator[harness.Row]:
    """One row per figure."""
    for row in parity.run(harness.device()):
        yield {
            "operation": row.op,
            "variant": row.impl,
            "case": row.case,
            "figure": row.figure.name,
            "found": row.figure.value,
            "allowed": row.figure.allowed,
            "passed": row.figure.passed,
        }


def main() -> int:
    """Prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    rows = harness.finish({"all": figures}, "against the reference", options)
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
