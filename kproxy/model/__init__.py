"""The desired state and what follows from it: values and functions without I/O, clocks or threads. Pure."""
