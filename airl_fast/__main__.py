"""`python -m airl_fast` is `airl-fast`."""

from airl_fast.cli import main

raise SystemExit(main())
