"""The word of a command line that lets model directories run code of their own, and how a refusal says it."""

TRUST = "model.trust_remote_code=true"
HOW_TO_TRUST = (
    "read that code, and if you trust it, repeat the command with --trust-remote-code (in Python: "
    "trust_remote_code=True)"
)
