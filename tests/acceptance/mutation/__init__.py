"""The mutation harness: no input may end in a traceback, a signal or a hang.

Each kind of input (`kinds/`) makes cases from (kind, seed, index) alone: files, edits in words, and commands to run on
them. `isolation` runs every command in a child process with limits, `verdict` judges how it ended, and
`python -m tests.acceptance.mutation` does both for a given number of cases.
"""
