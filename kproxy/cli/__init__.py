"""The command line: one module per command. Parsing and printing only."""
