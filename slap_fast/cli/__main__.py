"""``python -m slap_fast.cli``, as torchrun starts it."""

from __future__ import annotations

import sys

from slap_fast.cli import main

sys.exit(main())
