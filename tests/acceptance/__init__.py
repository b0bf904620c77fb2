"""Long-running checks of the whole program from outside, as its users see it; each is a command with --help.

    python -m tests.acceptance.kills                 a batch killed at random moments ends like one that never was
    python -m tests.acceptance.memory                memory stays flat over hundreds of pages
    python -m tests.acceptance.page_reuse            several tasks read a page once
    python -m tests.acceptance.constrained_answers   constrained answers are valid, whatever the model says
    python -m tests.acceptance.forced_tokens         forced text is not sampled, which changes no value
    python -m tests.acceptance.requests              a server under load answers correctly and leaks nothing
    python -m tests.acceptance.openapi               a server does what its OpenAPI document says
    python -m tests.acceptance.extras                each extra installs alone, and is all that its option needs
    python -m tests.acceptance.mutation              no input ends in a traceback, a signal or a hang

The tests in this folder run each check with small numbers, and with a deliberately broken promise.
"""
