"""The mutation harness: no input whatever ends in a traceback, a signal or a hang.

Each kind of input (`kinds/`) makes cases from (kind, seed, index) alone: files, edits in words, and commands to run on
them. `isolation` runs every command in a process of its own under limits, `verdict` judges how it ended, and
`python -m tests.acceptance.mutation` does both for as many cases as it is told.
"""
