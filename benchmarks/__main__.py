"""The benchmark suite: ``python -m benchmarks [PART ...] [--quick] [--out FILE]``.

Without PART, every part is measured, and the results are written to benchmarks/results/DEVICE.json, a table to
DEVICE.md beside it, and charts to docs/images/. With PART, the table is only printed, unless FILE is given: then JSON,
table and charts are written beside FILE. The exit code is 1 if a part failed.

    python -m benchmarks compare A.json B.json      compares two results files by ratio
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import charts, suite, tables


def main(
    arguments: Sequence[str] | None = None,
    parts: Mapping[str, tuple[float, float]] = suite.PARTS,
    package: str = "benchmarks.parts",
) -> int:
    """Runs the command, with the parts of another package in tests."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all; known: {', '.join(parts)}")
    parser.add_argument("--quick", action="store_true", help="few and short runs: at most 3 minutes, not 20")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON file to write")
    options = parser.parse_args(arguments)
    if options.parts[:1] == ["compare"]:
        if len(options.parts) != 3:
            parser.error("compare takes two results files.")
        print(tables.compared(*(json.loads(Path(path).read_text()) for path in options.parts[1:])))
        return 0
    if unknown := sorted(set(options.parts) - set(parts)):
        parser.error(f"Unknown part: {', '.join(unknown)}. Known parts: {', '.join(parts)}.")
    chosen = {name: seconds[not options.quick] for name, seconds in parts.items()}
    chosen = {name: seconds for name, seconds in chosen.items() if name in (options.parts or parts)}
    limit_s = suite.LIMIT_S[not options.quick]
    note = partial(print, flush=True)
    document = suite.run(chosen, limit_s, quick=options.quick, package=package, note=note)
    if document["figures"]:
        print(f"\n{tables.report(document)}")
        if options.out or not options.parts:
            out = options.out or suite.RESULTS / f"{document['slug']}.json"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(document, indent=1) + "\n")
            out.with_suffix(".md").write_text(f"# {document['slug']}\n\n{tables.report(document)}\n")
            charts.draw(document, out.parent if options.out else suite.CHARTS)
            print(f"\nWrote {out}.")
    return 1 if document["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
