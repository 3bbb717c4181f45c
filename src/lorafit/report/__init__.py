"""From the records of a run to a self-contained HTML page.

Reads JSON lines and needs no part of this library but its errors. `read_records` needs the standard library
alone; `write_report` needs plotly (`pip install "lorafit[report]"`).
"""

from lorafit.report.history import read_records
from lorafit.report.page import write_report

__all__ = ["read_records", "write_report"]
