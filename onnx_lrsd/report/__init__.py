"""The report in three faces: JSON for programs, a table for people, a page to look closer."""

from onnx_lrsd.report.html import report_page
from onnx_lrsd.report.json import (
    comparison_to_json,
    inspection_to_json,
    plan_from_json,
    plan_to_json,
    report_to_json,
    sweep_to_json,
)
from onnx_lrsd.report.node_data import node_data_files
from onnx_lrsd.report.other_tables import inspection_table, machine_table, sweep_table
from onnx_lrsd.report.table import comparison_table, drift_table, report_table

__all__ = [
    "comparison_table",
    "comparison_to_json",
    "drift_table",
    "inspection_table",
    "inspection_to_json",
    "machine_table",
    "node_data_files",
    "plan_from_json",
    "plan_to_json",
    "report_page",
    "report_table",
    "report_to_json",
    "sweep_table",
    "sweep_to_json",
]
