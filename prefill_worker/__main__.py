"""`python -m prefill_worker front|rank`: a process of a prefill worker, started by a launcher."""

from prefill_worker.role import PREFILL
from worker.main import run

run({PREFILL.name: PREFILL})
