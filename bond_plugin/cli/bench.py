"""``bond bench``: a matrix of algorithm x strength x seed, each cell a real training run, and a report."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

from bond_plugin import options
from bond_plugin.bench import matrix
from bond_plugin.files import ContentError, unwritable, write_whole

_DESCRIPTION = """\
Compare algorithms by what they reach: reward and win rate against KL to the reference, on the same model, prompts,
reward and number of generated tokens. Each cell of the matrix is a `bond train` run, measured on held-out prompts
beside Best-of-1...64 of the reference and beside the limit that no policy can exceed at a given KL.
"""

_EPILOG = """
Written to --output-dir: report.html, report.md, results.jsonl, reference.json, figures/, cells/ (logs and metrics).
Started again, the same command goes on where it was stopped: finished cells are kept, failed ones are tried again.

examples:
  bond bench recipes/miniature/bench.yaml --output-dir runs/bench
  bond bench recipes/miniature/bench.yaml --output-dir runs/bench --check     what would run; nothing starts
  RAY_ADDRESS=auto bond bench FILE.yaml --output-dir DIR                      on a cluster, as many cells as it takes
"""


def main(argv: list[str]) -> int:
    """Compare. Returns the exit status: 2 for an unusable matrix or folder, 1 if cells failed, 130 if stopped."""
    args = build_parser().parse_args(argv)
    from bond_plugin.bench import runner

    started = time.monotonic()

    def say(message: str) -> None:
        print(f"[{timedelta(seconds=int(time.monotonic() - started))}] {message}", flush=True)

    failed = 0
    try:
        wanted = matrix.read(args.matrix).only(args.only)
        if not args.report:
            output, command = args.output_dir.resolve(), shlex.join(["bond", "bench", *argv])
            if problem := unwritable(output):
                raise runner.BenchError(f"--output-dir {problem}; name another folder")
            output.mkdir(parents=True, exist_ok=True)
            how = {"parallel": args.parallel, "keep_policies": args.keep_policies, "command": command}
            with runner.opened(wanted, output, say, **how) as bench:
                bench.check()
                if args.check:
                    print("\n".join(cell.name for cell in wanted.cells))
                    return 0
                write_whole(output / "matrix.yaml", args.matrix.read_bytes())
                failed = bench.run()
        from bond_plugin.bench import report

        written = report.write_report(args.output_dir)
    except (matrix.MatrixError, runner.BenchError, ContentError) as error:
        print(f"bond bench: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nbond bench: stopped. Finished cells are kept; the same command goes on", file=sys.stderr)
        return 130
    print(f"written: {', '.join(map(str, written))}", flush=True)
    if failed:
        print(f"bond bench: {failed} cells failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser("bench", _DESCRIPTION, f"{matrix.__doc__}{_EPILOG}")
    parser.add_argument("matrix", type=Path, metavar="FILE.yaml", help="what is compared; see below")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="made if missing")
    parser.add_argument(
        "--parallel",
        type=_positive,
        default=0,
        metavar="N",
        help="cells at a time (default: as many as the GPUs of the machine or of the cluster at RAY_ADDRESS take; "
        "without GPU one for four cores)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="METHOD",
        default=[],
        help="run only these methods of the file; the report has those of the others that are finished, too",
    )
    parser.add_argument("--check", action="store_true", help="check every cell's flags, list the cells, and stop")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, and stop")
    parser.add_argument("--keep-policies", action="store_true", help="keep the weights of every trained policy")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
