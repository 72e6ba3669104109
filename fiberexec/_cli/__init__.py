"""What the command ``fiberexec`` does; the command line itself is fiberexec.cli."""
