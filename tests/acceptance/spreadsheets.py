"""Exports tables full of traps and checks how LibreOffice, openpyxl, pandas and duckdb read the files.

Every program must show what the CSV has, and no cell may be a formula.

    python -m tests.acceptance.spreadsheets --documents 40

LibreOffice (Debian: libreoffice-calc) must be installed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import re
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import openpyxl
import pandas

import granite4v
from granite4v.runtime.extract.record import Record, encode
from tests.helpers.tables import LINES, ODD_TEXTS, random_table

TRAPS = [
    "=1+1", '=HYPERLINK("http://x","y")', "+A1", "-1+2", "@SUM(A1)", "-cmd|' /C calc", "=", "'=1", "#N/A", "#DIV/0!",
    "0", "-0", "5", "-5", "+5", "007", "1.50", "12.5", "0.001", "0.00001", "1e5", "1,234", "1.234,5", "99999999999",
    "123456789012345678", "3.141592653", "0.123456789", "-0.12345678", "1234567.891", "50%", "$5", "true", "FALSE",
    "NaN", "inf", "2020-01-02", "1/2", "  x ", "\tx", "a\rb", "x" * 3000, "a;b", '"', "''", "\u200b", "\u00a0", "",
]  # fmt: skip
# writes every sheet to its own CSV file, as it is shown
_SHEETS = "csv:Text - txt - csv (StarCalc):44,34,76,1,,0,false,true,false,false,false,-1"


@dataclass
class Tally:
    n_tables: int = 0
    n_cells: int = 0
    n_numbers: int = 0
    n_formulas: int = 0
    n_different: int = 0

    def compare(self, what: str, found: list[list[str]], expected: list[list[str]]) -> None:
        self.n_different += found != expected
        if found != expected:
            print(f"{what}: {found!r:.2000}\nexpected {expected!r:.2000}")


def records(n_documents: int, seed: int) -> list[Record]:
    rng = random.Random(seed)
    found: list[Record] = []
    for number in range(n_documents):
        source, stem = f"in/{number}.pdf", f"d{number}"
        for page in range(1, rng.randint(2, 4)):
            texts = rng.choice([TRAPS, [*TRAPS, *ODD_TEXTS, *LINES]])
            tables = [random_table(rng.randrange(1 << 30), texts) for _ in range(rng.randint(1, 3))]
            found.append(Record(source, page, 3, "tables_html", value=tables, valid=True, stem=stem))
            fields = {f"f{i}": rng.choice([*TRAPS, 5, -2.5, True, None, ["x"]]) for i in range(12)}
            found.append(Record(source, page, 3, "kvp", value=fields, valid=True, stem=stem))
    return found


def rows_of(content: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content, newline="")))


def tables_of(folder: Path) -> dict[str, list[list[str]]]:
    """Returns the rows of every CSV file, by the name of the sheet that has the same table."""
    found = {}
    for path in folder.glob("*.csv"):
        name = re.fullmatch(r"(d\d+)\.(\w+)\.page(\d+)(?:-(\d+))?", path.stem)
        key = (
            f"{name[1]}.tables-p{name[3]}{f'-{name[4]}' if name[4] and name[4] != '1' else ''} {name[2]}"
            if name
            else ""
        )
        content = path.read_bytes().decode("utf-8")
        found[key or "kvp-kvp"] = [[re.sub("\r\n?", "\n", text) for text in row] for row in rows_of(content)]
    return found


def check_openpyxl(folder: Path, tables: dict[str, list[list[str]]], tally: Tally) -> None:
    for path in folder.glob("*.xlsx"):
        for sheet in openpyxl.load_workbook(path):
            rows = [["" if cell.value is None else str(cell.value) for cell in row] for row in sheet.iter_rows()]
            tally.compare(
                f"openpyxl {path.name} {sheet.title}", padded(rows), padded(tables[f"{path.stem}-{sheet.title}"])
            )
            tally.n_tables += 1
            for cell in (cell for row in sheet.iter_rows() for cell in row):
                tally.n_cells += 1
                tally.n_numbers += cell.data_type == "n" and cell.value is not None
                tally.n_formulas += cell.data_type in "fe"
                tally.n_formulas += cell.data_type != "s" and str(cell.value).startswith(("=", "+", "-", "@"))


def check_libreoffice(folder: Path, tables: dict[str, list[list[str]]], tally: Tally) -> None:
    """Checks what the sheets show in LibreOffice, and counts formulas in its own format."""
    with tempfile.TemporaryDirectory() as work:
        command = ["soffice", f"-env:UserInstallation=file://{work}/profile", "--headless", "--convert-to"]
        for target in (_SHEETS, "ods"):
            subprocess.run(
                [*command, target, "--outdir", work, *map(str, sorted(folder.glob("*.xlsx")))],
                check=True,
                capture_output=True,
                timeout=600,
            )
        shown = {path.stem: rows_of(path.read_text(encoding="utf-8")) for path in Path(work).glob("*.csv")}
        tally.n_different += len(set(shown) ^ set(tables))
        for name, rows in shown.items():
            tally.compare(f"LibreOffice {name}", padded(rows), padded(tables[name]))
        for path in Path(work).glob("*.ods"):
            content = zipfile.ZipFile(path).read("content.xml").decode("utf-8")
            tally.n_formulas += len(re.findall("table:formula", content))


def padded(rows: list[list[str]]) -> list[list[str]]:
    """Removes empty rows and cells at the end, which a sheet does not keep."""
    kept = [list(row) for row in rows]
    for row in kept:
        while row and not row[-1]:
            row.pop()
    while kept and not kept[-1]:
        kept.pop()
    return kept


def check_parquet(folder: Path, csv_folder: Path, tally: Tally) -> None:
    for path in folder.glob("*.parquet"):
        expected = rows_of((csv_folder / f"{path.stem}.csv").read_bytes().decode("utf-8"))
        frame, found = pandas.read_parquet(path), duckdb.sql(f"select * from '{path}'")
        as_texts = [[spelled(value) for value in row] for row in found.fetchall()]
        frame_texts = [[spelled(value) for value in row] for row in frame.astype(object).itertuples(index=False)]
        body = expected[len(expected) - len(as_texts) :]
        tally.compare(f"duckdb {path.name}", as_texts, body)
        tally.compare(f"pandas {path.name}", frame_texts, body)


def spelled(value: Any) -> str:
    if value is None or value is pandas.NA or value != value:
        return ""
    return value if isinstance(value, str) else json.dumps(value.item() if hasattr(value, "item") else value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    if shutil.which("soffice") is None:
        raise SystemExit("LibreOffice is not installed; on Debian: apt-get install libreoffice-calc")
    tally = Tally()
    with tempfile.TemporaryDirectory() as work:
        results = Path(work) / "results"
        results.mkdir()
        written = b"".join(map(encode, records(chosen.documents, chosen.seed)))
        (results / "results.jsonl").write_bytes(written)
        for name in ("csv", "xlsx", "parquet"):
            exported = granite4v.export_results(results, name, out=Path(work) / name, say=print)
            assert exported.n_failed == 0
        tables = tables_of(Path(work) / "csv")
        check_openpyxl(Path(work) / "xlsx", tables, tally)
        check_libreoffice(Path(work) / "xlsx", tables, tally)
        check_parquet(Path(work) / "parquet", Path(work) / "csv", tally)
    version = subprocess.run(["soffice", "--version"], capture_output=True, text=True).stdout.split()[1]
    print(json.dumps({**vars(tally), "libreoffice": version, "openpyxl": openpyxl.__version__}))
    raise SystemExit(tally.n_different > 0 or tally.n_formulas > 0)


if __name__ == "__main__":
    main()
