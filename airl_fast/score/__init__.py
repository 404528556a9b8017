"""Anyone's traces, from a file of any size: `airl-fast score` and `airl-fast localize`, a command and its parts."""
