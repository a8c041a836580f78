"""`ddkit.checks.check` under the import path that notebooks use."""

from ddkit.checks.check import check_path as check_path
from ddkit.checks.check import check_set as check_set
from ddkit.checks.check import check_tensor as check_tensor
from ddkit.sets.findings import Finding as Finding
from ddkit.sets.findings import Report as Report
