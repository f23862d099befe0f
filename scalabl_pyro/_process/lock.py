"""One lock for what the whole process shares, so that threads may sample and predict at the same time.

torch's default generators, Pyro's handler stack and settings, and fast tokenizers belong to the process, not to a
thread. Whoever changes or needs them holds :data:`LOCK` for that while. Passes through an LLM run without it; the
train modes they depend on are counted in :mod:`scalabl_pyro.lora.forward`.
"""

import threading

#: Reentrant: a function that holds it may call others that take it.
LOCK = threading.RLock()
#: Notified when a module is no longer used by any prediction.
IDLE = threading.Condition(LOCK)
