"""The command line: ``slap-fast COMMAND --help`` shows what each takes, with an example.

Exit codes: 0 done, 1 the work failed, 2 a mistake in what was asked, 130 stopped by Ctrl-C. Heavy
imports wait until a command needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import tyro
from tyro.extras import SubcommandApp

from slap_fast import __version__
from slap_fast.cli import data, demo, evaluate, export, infer, machine, train
from slap_fast.cli.options import within_bounds
from slap_fast.console import print_any_text

VERSION = f"Version {__version__}; --version prints it alone."
app = SubcommandApp()
app.command(data.app, name="data", help="Check a collection, pack it into shards.")
COMMANDS = (
    demo.demo, train.train, evaluate.eval, infer.embed, infer.classify, infer.caption,
    export.export, export.export_weights, machine.plan, machine.doctor, machine.bench,
)  # fmt: skip
for command in COMMANDS:
    app.command(within_bounds(command))


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a user's mistake is one line on stderr."""
    # OpenMP's threads spin while they wait. Of slap_tiny on 2 cores that are free, a step takes
    # 0.6 s however they wait, or 0.9 s if they sleep at once; beside one other busy process it
    # takes over 10 s if they spin as long as they like, and 1.8 s with this. Read when torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    print_any_text()
    args = sys.argv[1:] if args is None else args
    if [*args] == ["--version"]:
        print(f"slap-fast {__version__}")
        return 0
    try:
        return app.cli(
            prog="slap-fast",
            description=f"Scalable language-audio pretraining (arXiv 2601.12594), fast. {VERSION}",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"slap-fast: error: {error}", file=sys.stderr)
        return 1 if _broken_disk(error) else 2
    except (RuntimeError, MemoryError) as error:
        text, causes = str(error), ("out of memory", "t allocate memory")
        if isinstance(error, RuntimeError) and not any(cause in text for cause in causes):
            raise
        print(
            "slap-fast: error: out of memory; lower --max-tokens (a larger batch is then split and "
            f"its gradients accumulated): {text.partition(chr(10))[0]}",
            file=sys.stderr,
        )
        return 1


def _broken_disk(error: Exception) -> bool:
    """Whether the disk is full or broken: no mistake of the user's."""
    codes = {getattr(e, "errno", None) for e in (error, error.__cause__)}
    return bool(codes & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
