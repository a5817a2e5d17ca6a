"""Every kernel of this device against the reference in fp64, in each dtype: the tolerance rule.

    python benchmarks/numerics.py [--json FILE]

The same as `slap-fast doctor --parity`, as a record. Exit code 1 when a figure is over its bound.
"""

from __future__ import annotations

import sys

import harness

from slap_fast import parity


def main() -> int:
    """Prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    rows = [
        {"operation": row.op, "variant": row.impl, "case": row.case, "figure": row.check.name}
        | {"found": row.check.found, "allowed": row.check.allowed, "passed": row.check.passed}
        for row in parity.run(harness.device())
    ]
    harness.finish(rows, "against the reference", options.json)
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
