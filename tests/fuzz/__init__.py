"""Fuzzing of everything that parses input from outside: seeded mutations of small corpora (`make fuzz`)."""
