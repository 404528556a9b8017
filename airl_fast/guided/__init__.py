"""Generate under the guidance of a learned reward: the reward decides while a trace is written, not only after."""
