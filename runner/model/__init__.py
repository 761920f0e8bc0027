"""Everything that knows a language model. The only package that imports torch.

Threads of torch's OpenMP wait asleep and not spinning, unless the user says otherwise: beside any
other busy process spinning threads lock each other out (measured: ten times slower on two cores),
and on an idle machine it costs nothing. OpenMP reads this once, when torch is first imported.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
