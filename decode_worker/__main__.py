"""`python -m decode_worker front|rank`: a process of a decode or mixed worker, started by a launcher."""

from decode_worker.role import DECODE, MIXED
from worker.main import run

run({DECODE.name: DECODE, MIXED.name: MIXED})
