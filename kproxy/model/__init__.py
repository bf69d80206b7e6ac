"""The desired state and what is derived from it: values and functions without I/O, clocks or threads. Pure."""
