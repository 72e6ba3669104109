"""Where workers come from: one module a backend, and the Protocol that all of them satisfy in ``base``."""
