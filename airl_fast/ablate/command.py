"""`airl-fast ablate GRID`: start policies, then every variant on every seed, then the table and the figure."""

from collections.abc import Sequence
from pathlib import Path

from airl_fast.ablate.grid import read_grid, run_jobs, select, start_jobs
from airl_fast.ablate.runner import Runner
from airl_fast.ablate.table import draw, read_outcome, render, write_json
from airl_fast.baselines import end_with_parent
from airl_fast.errors import UserError
from airl_fast.rundir import write_atomically


def ablate(
    name: str,
    root: Path,
    presets: Path,
    *,
    words: Sequence[str] = (),
    topics: Sequence[str] = (),
    seeds: Sequence[int] = (),
    processes: int = 2,
) -> tuple[str, list[str]]:
    """Train what is not trained yet under `root`; returns the table and the names of runs that failed.

    Writes table.txt, table.json and figure.png there. The same command continues an ablation that was interrupted.
    """
    end_with_parent()
    grid = select(read_grid(name, presets), topics, seeds)
    root = root.expanduser()
    starts, jobs = start_jobs(grid, root, presets, words), run_jobs(grid, root, presets, words)
    print(f"{len(jobs)} runs: {len(grid.variants)} variants on seeds {', '.join(map(str, grid.seeds))}, in {root}")
    runner = Runner(processes, lambda text: print(text, flush=True))
    failed = runner.run(starts, "start policies")
    if failed:
        raise UserError(
            f"the start policy {failed[0]} could not be made; its log is {root / 'starts' / failed[0]}.log."
        )
    failed = runner.run(jobs, "runs")
    outcome = read_outcome(grid.variants, jobs)
    table = render(outcome)
    write_atomically(root / "table.txt", table)
    write_json(root / "table.json", outcome)
    draw(root / "figure.png", outcome)
    return f"{table}{root / 'figure.png'}, {root / 'table.json'}\n", failed
