"""Print what failed in JUnit reports FOLDER/WAY.xml as a Markdown table; exit with 1 if any did.

python tools/test_table.py FOLDER WAY...
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

FAULTS = ("failure", "error")


def row_of(way: str, report: Path) -> tuple[str, bool]:
    """Return the row of a way, and whether all is well."""
    if not report.exists():
        return f"| {way} | | | | the tests did not end |", False
    cases = list(ET.parse(report).iter("testcase"))
    failed = [
        f"`{case.get('classname')}::{case.get('name')}` ({float(case.get('time', 0)):.0f} s)"
        for case in cases
        if any(case.find(fault) is not None for fault in FAULTS)
    ]
    wall_s = max(float(suite.get("time", 0)) for suite in ET.parse(report).iter("testsuite"))
    slowest_s = max((cpu_seconds(case) for case in cases), default=0.0)
    said = "<br>".join(failed) or "nothing"
    row = f"| {way} | {len(cases)} | {wall_s:.0f} | {slowest_s:.0f} | {said} |"
    return row, bool(cases) and not failed


def cpu_seconds(case: ET.Element) -> float:
    """Return what a test took, as `tests/conftest.py` notes it."""
    found = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    return float(found.get("cpu_s") or 0)


def main(folder: str, *ways: str) -> int:
    rows = [row_of(way, Path(folder) / f"{way}.xml") for way in ways]
    print("| as on | tests | seconds | most CPU seconds of a test | failed |")
    print("|---|--:|--:|--:|---|")
    for row, _ in rows:
        print(row)
    return int(not all(good for _, good in rows))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
