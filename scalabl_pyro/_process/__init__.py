"""What the whole process shares: one lock, random states, Pyro's modes, stop signals."""
