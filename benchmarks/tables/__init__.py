"""The tables of benchmarks/retrieval.py: each a question, the rows that answer it, and how docs/ shows them.

A new one is a file here that lists its rows, and an entry below.
"""

from benchmarks.tables import equality, fewer_proxies, learning_rates, methods, negatives, parts, recipes
from benchmarks.tables.table import Row, Table

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        learning_rates.TABLE,
        methods.TABLE,
        negatives.TABLE,
        parts.TABLE,
        fewer_proxies.TABLE,
        equality.TABLE,
        recipes.TABLE,
    )
}

__all__ = ["TABLES", "Row", "Table"]
