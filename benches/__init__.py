"""The benchmarks: `python -m benches`. One file for each op, with the op's name.

They run from a checkout and are not installed. `docs/performance.md` says how to read them.
"""
