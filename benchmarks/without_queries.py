"""Rows of one JSONL file whose query does not occur in another.

python benchmarks/without_queries.py ROWS.jsonl OTHER.jsonl.gz > rest.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from refusion.synthesis.jsonl import read_queries, read_rows

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("other", type=Path)
    args = parser.parse_args()
    taken = set(read_queries(args.other))
    sys.stdout.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in read_rows(args.rows) if row["query"] not in taken)
