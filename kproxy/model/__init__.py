"""The desired state and the decisions: pure values and functions, no I/O, no clock, no thread."""
