"""The runner killed, starved, filled up and lied to, at every point where it touches the disk.

A sample of each test runs with the others: 117 tests, a minute on two cores that others use too.
All of it runs with RUNNER_TORTURE=1 (`make torture`): half an hour on the same cores, namely

    R1   test_random_kills       1,000 kills of an apply, 1,000 of its work without the imports
         test_checkpoints        200 kills of a training's saving
    R2   test_kills_at_calls     every call of two applies that changes the disk
         test_checkpoints        every such call of five saves with their prunes
    R3   test_errors_at_calls    seven errors of every call, once, and for ever in two ways
         test_checkpoints        five errors of every call, once and for ever
    R4   test_full_disks         40 sizes, 60 counts of files, 40 rooms that vanish, 10 limits
    R7   test_signals            210 signals at random times
    R8   test_two_applies        20 pairs
    R14  test_strange_places     52 places, names, links and clocks
    R15  test_order_of_calls     every publish of two applies; test_checkpoints: of five saves

Where strace, or the right to trace or to mount, is missing, the tests that need it are skipped.
"""
