"""`airl-fast bench` and `doctor`."""

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser("bench", help="measure the fused operations, or a training step")
    bench.add_argument("name", metavar="ops|step|updates|roofline|resources")
    bench.add_argument("flags", nargs=argparse.REMAINDER, help="passed on; see `airl-fast bench ops --help`")
    bench.set_defaults(command=_bench)

    doctor = commands.add_parser("doctor", help="say what this machine has, and what would run on what")
    doctor.set_defaults(command=_doctor)


def _bench(arguments: argparse.Namespace) -> int:
    from airl_fast.benchmark import run_benchmark

    return run_benchmark(arguments.name, arguments.flags)


def _doctor(arguments: argparse.Namespace) -> int:
    from airl_fast import doctor

    report = doctor.collect()
    print(doctor.render(report))
    return report.exit_status
