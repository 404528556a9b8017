"""A row of results with plausible numbers, to change in tests."""

from dataclasses import fields

from bench.results import Row

_NUMBERS = {field.name: {"str": "", "int": 1, str: "", int: 1}.get(field.type, 1.0) for field in fields(Row)}
ROW = Row(
    **{
        **_NUMBERS, "op": "linear_logprob", "mode": "frozen f+b", "shape": "linear:4096x3584x152064", "backend": "airl",
        "percent_of_floor": 81.0, "ratio_to_peer": {"eager": 3.0, "liger": 1.2},
        "memory_ratio_to_peer": {"eager": 9.0, "liger": 1.0},
    }
)  # fmt: skip
