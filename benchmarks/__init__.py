"""Measurements that anyone can run, in a folder for each question.

    cost          how much memory and time a meta-step takes
    convergence   whether the claims of the theory hold
    accuracy      how well the methods do on held-out tasks
    peers         how fast other libraries make the same meta-step
    scaling       what happens on many devices

Each command is `python -m benchmarks.FOLDER.NAME`, with `--help`; `benchmarks.regress` is the check
for continuous integration. Folders share `harness` (arguments, clocks, compiled programs, tables,
pictures) and `problems`, and import nothing from one another.
"""
