"""What becomes of requests when something is killed, stopped, flooded or attacked? One harm at a time, under load.

    python benchmarks/reliability.py                          # every harm, about an hour and a half
    python benchmarks/reliability.py overload tenants
    python benchmarks/reliability.py --part 0.1 -o FILE       # a tenth of each harm's time; writes the table

Starts the real application with ``slowlens serve``, sends it real requests, counts, and prints a table; exits with
status 1 if something was not reached. Needs Linux, port 8000, aiohttp (Ray has it), and for ``fuzz`` schemathesis in
``benchmarks/.environments/schemathesis``:

    python -m venv benchmarks/.environments/schemathesis
    benchmarks/.environments/schemathesis/bin/pip install schemathesis==4.32.5
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from harms import HARMS, Finding


def table(results: dict[str, list[Finding]]) -> str:
    lines = ["| harm | to reach | measured | |", "| --- | --- | --- | --- |"]
    for name, findings in results.items():
        harm = HARMS[name]
        measured = "; ".join(finding.measured for finding in findings)
        reached = "reached" if all(finding.is_reached for finding in findings) else "**missed**"
        lines.append(f"| {name}: {harm.what} | {harm.to_reach} | {measured} | {reached} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("harms", nargs="*", metavar="HARM", help=f"any of {', '.join(HARMS)}; default: all")
    parser.add_argument("--part", type=float, default=1.0, help="part of each harm's usual time; default: 1")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE")
    options = parser.parse_args()
    if unknown := set(options.harms) - set(HARMS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    results: dict[str, list[Finding]] = {}
    for name in options.harms or HARMS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = HARMS[name].run(Path(folder), options.part)
        for finding in results[name]:
            print(f"{name}: {'reached' if finding.is_reached else 'MISSED'}: {finding.measured}", flush=True)
    print(f"\n{table(results)}")
    if options.output is not None:
        options.output.write_text(table(results) + "\n")
    return int(not all(finding.is_reached for findings in results.values() for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
