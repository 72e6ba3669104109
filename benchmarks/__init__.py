"""Benchmarks: how fast fiberexec is beside other executors and pools, in one run.

``python -m benchmarks`` prints the table of ``docs/benchmarks.md``.  The data flow, and one module for each
step:

    __main__   the command line
       |
    rows       what is measured, against whom, and the target of each row
       |
    runner     rounds of cells: a cell is one peer and one workload, in a process of its own
       |
    cell       that process: opens the peer, warms it up, measures, closes it
       |-- peers       one class for each executor or pool, all with the same five calls
       |-- workloads   one function for each thing that is measured
       `-- tasks       the functions that the workers run
       |
    report     medians of ratios taken within a round, as markdown

A machine drifts: its clock changes, a neighbour wakes up.  So rounds are interleaved (round, workload,
peer, the order of the peers rotated), and a ratio is only ever taken between two cells of the same round.
"""
