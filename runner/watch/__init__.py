"""`runner watch`: applies recipes whenever files arrive, and trains when that is worth it.

loop.py        the one thread that decides what happens next
arrivals.py    what the system tells about folders: it only marks, a scan decides
scan.py        all source files of a recipe as they are now, none of them opened
schedule.py    when to start: after quiet, after a failure, when `retrain:` allows it
work.py        one run, in a process of its own; process.py is the side that starts it
record.py      what `runner status` reads, the log, and the lock
notify.py      who is told when a run has ended
committed.py   the lockfile as a commit
"""
