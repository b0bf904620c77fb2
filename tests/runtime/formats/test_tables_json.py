"""Tests of tables as JSON: what they can express, what models write, and cells before their dimensions."""

from __future__ import annotations

import json

import pytest

from granite4v.runtime.formats import Cell, Table, read, read_tables_json, salvage, write_tables_json
from tests.helpers.tables import SMALL, assert_error


def test_json_keeps_levels_and_white_space() -> None:
    table = Table(2, 1, 2, (Cell(0, 0, " x\t", header=True, header_level=2), Cell(1, 0, "", header_level=7)))
    assert read_tables_json(write_tables_json(table)) == [table]


def test_json_as_models_may_write_it() -> None:
    text = write_tables_json(SMALL)
    assert read("tables_json", f"```json\n{text}\n```") == [SMALL]
    assert read("tables_json", f"Here:\n```json\n{text}```") == [SMALL]
    assert read("tables_json", f"[{text}, {text}]") == [SMALL, SMALL]
    assert read("tables_json", text.replace('"rows": 2', '"rows": 3')) == [SMALL]
    short = '{"dimensions": {"columns": 2, "total_rows": 1}, "cells": [{"row": 1, "col": 2, "content": 12.50}, '
    short += '{"row": 1, "col": 1, "content": null}]}'
    assert read_tables_json(short)[0].texts() == [["", "12.50"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cells": [',
         "invalid JSON at character 11, before '': Expecting value; expected one JSON value."),
        ("```json\n{,}\n```",
         "invalid JSON at character 9, before ',}\\n```': Expecting property name enclosed in double quotes; expected "
         "one JSON value."),
        ("3", "table 1 is 3; expected an object with 'dimensions' and 'cells'."),
        ('{"cells": []}', "'dimensions' of table 1 is None; expected an object."),
        ('{"dimensions": {}, "cells": [{"row": 0, "col": 1, "content": ""}]}',
         "'row' of cell 1 of table 1 is 0; expected an integer of 1 or more."),
        ('{"dimensions": {}, "cells": [{"row": 1, "col": true, "content": ""}]}',
         "'col' of cell 1 of table 1 is True; expected an integer of 1 or more."),
        ('{"dimensions": {}, "cells": [{"row": 1, "col": 1, "type": "x"}]}',
         "'type' of cell 1 of table 1 is 'x'; expected 'header' or 'data'."),
        ('{"dimensions": {}, "cells": [{"row": 1, "col": 1, "type": []}]}',
         "'type' of cell 1 of table 1 is []; expected 'header' or 'data'."),
        ('{"dimensions": {}, "cells": [{"row": 1, "col": 1, "content": []}]}',
         "'content' of cell 1 of table 1 is []; expected text."),
        ('{"dimensions": {}, "cells": [7]}', "cell 1 of table 1 is 7; expected an object."),
        ('{"dimensions": {"columns": 2, "total_rows": 1}, "cells": [{"row": 1, "col": 1}]}',
         "table 1: row 1, column 2 is not covered by any cell; expected one cell for each slot."),
        ('{"dimensions": {"columns": 1}, "cells": [{"row": 1, "col": 1}, {"row": 1, "col": 1}]}',
         "table 1: row 1, column 1 is covered twice, by the cells that start at row 1, column 1 and at row 1, column "
         "1; expected one cell for each slot."),
        ('{"dimensions": {"columns": 1, "total_rows": 1}, "cells": [{"row": 2, "col": 1}]}',
         "table 1: the cell at row 2, column 1 spans 1 rows and 1 columns; expected it to lie within 1 rows and 1 "
         "columns."),
        ('{"dimensions": {"columns": 2000000}, "cells": [{"row": 1, "col": 1, "colspan": 2000000}]}',
         "table 1: a table of 1 rows and 2000000 columns; expected at most 1000000 slots."),
        ('{"dimensions": {"columns": 1, "rows": 5}, "cells": [{"row": 1, "col": 1}]}',
         "'rows' of 'dimensions' of table 1 is 5; expected 1 (those below the header) or 1 (all)."),
        ('{"dimensions": {"columns": 1, "header_rows": 2}, "cells": [{"row": 1, "col": 1}]}',
         "table 1: a table of 1 rows has 2 header rows; expected 0 to 1."),
        ("[" * 600 + "]" * 600, "JSON nested deeper than 64 levels; expected a few."),
        ('{"dimensions": {}, "cells": [{"row": 1, "col": 1, "rowspan": 20000000000, "content": ""}]}',
         "'rowspan' of cell 1 of table 1 is 20000000000; expected at most 1,000,000,000."),
        (json.dumps([{"dimensions": {"columns": 500_000}, "cells": [
            {"row": 1, "col": 1, "colspan": 500_000, "content": ""}]}] * 3),
         "3 tables of 1,500,000 slots together; expected at most 1,000,000."),
    ],
)  # fmt: skip
def test_an_invalid_answer_gives_what_was_found_where_and_what_was_expected(text: str, message: str) -> None:
    assert_error("tables_json", text, message)


def test_json_cells_before_their_dimensions_are_kept() -> None:
    found = json.loads(write_tables_json(SMALL))
    text = json.dumps({"cells": found["cells"], "dimensions": found["dimensions"]})
    kept = salvage("tables_json", text[: text.index("dimensions")])
    assert kept is not None
    assert kept.value[0].texts() == SMALL.texts()
