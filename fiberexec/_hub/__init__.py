"""The hub: one process beside the root driver that holds what a program's processes share.

    process ── Unix socket, one connection for each call under way ──► hub: locks, queues, descriptors
            ◄── reply, at once or when it is its turn ────────────────

`launch` starts it and knows its address, `client` asks it, `server` is its loop, and each kind of object has a module.

Rules:
- The hub unpickles nothing but plain builtins; what users share travels through it as bytes.
- Who connects proves that it belongs to the program by a token, before anything else that it sends is read.
- A process has gone when all of its connections are closed. What it held comes back then.
"""
